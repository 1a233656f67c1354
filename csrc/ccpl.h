// The two operators of the contrastive coherence loss (Wu 2022): neighbor_difference, y[b, 8n+j] = x[b, :, anchor n] -
// x[b, :, its neighbour j], and info_nce, loss[b,i] = log(sum over j of exp(s_ij)) - s_ii with s_ij = q_i·k_j / tau.
// Here: the mathematics that the CPU and the CUDA kernels share, the arguments, and the entry points.
#pragma once

#include <cmath>

#include "common.h"

namespace restoration {

constexpr int64_t kNeighbors = 8;
// The places that one anchor touches: itself, then its neighbours. Place `slot` of anchor n is entry 9n + slot.
constexpr int64_t kSlots = kNeighbors + 1;

// x is [B,C,H,W] in one of two layouts: NCHW (channel_stride = places, place_stride = 1), channels-last (1, channels).
struct NeighborDifferenceSizes {
  int64_t batch;
  int64_t channels;
  int64_t places;  // H·W
  int64_t anchors;
  int64_t channel_stride;
  int64_t place_stride;

  HOST_DEVICE int64_t entries() const { return anchors * kSlots; }
  HOST_DEVICE bool holds(int64_t place) const { return place >= 0 && place < places; }
};

// Throws std::invalid_argument; defined in ccpl_bindings.h.
[[noreturn]] void refuse_place(int64_t place, const NeighborDifferenceSizes&);

// places [9N], int64: of each entry. y [B,8N,C], of the dtype of x.
struct NeighborDifferenceForward {
  const void* x;
  const int64_t* places;
  void* y;
};

// grad_y [B,8N,C]; grad_x as x, full of zeros. Sorted: places [9N] ascend, and order [9N] names the entry of each;
// every place is then written once, by whoever owns its first entry. A null order, of the CUDA launcher alone and for
// float32 and float64: entries as they come, added atomically.
struct NeighborDifferenceBackward {
  const void* grad_y;
  const int64_t* places;
  const int64_t* order;
  void* grad_x;
};

struct InfoNceSizes {
  int64_t batch;
  int64_t rows;   // S
  int64_t width;  // D
};

// query, key [B,S,D] are of the call's dtype; loss and log_sum [B,S], kept for backward, of its AccumulateType.
struct InfoNceForward {
  const void* query;
  const void* key;
  void* loss;
  void* log_sum;  // of exp(s_ij) over j
};

// grad_loss [B,S] is of the AccumulateType; grad_query [B,S,D] of the call's dtype.
struct InfoNceBackward {
  const void* grad_loss;
  const void* query;
  const void* key;
  const void* log_sum;
  void* grad_query;
};

// What one entry adds to the gradient of channel `channel` at its place; grad_y is that of the entry's image.
template <typename A, typename T>
HOST_DEVICE A entry_gradient(const T* grad_y, int64_t entry, int64_t channel, int64_t channels) {
  const int64_t slot = entry % kSlots;
  const T* rows = grad_y + entry / kSlots * kNeighbors * channels + channel;
  if (slot > 0) return -static_cast<A>(rows[(slot - 1) * channels]);
  A sum = 0;
  for (int64_t neighbor = 0; neighbor < kNeighbors; ++neighbor) sum += static_cast<A>(rows[neighbor * channels]);
  return sum;
}

#define DECLARE_CCPL_CPU(isa)                                                                                        \
  namespace isa {                                                                                                    \
  void neighbor_difference_forward(const NeighborDifferenceForward&, const NeighborDifferenceSizes&, DType,          \
                                   int threads);                                                                     \
  void neighbor_difference_backward(const NeighborDifferenceBackward&, const NeighborDifferenceSizes&, DType,        \
                                    int threads);                                                                    \
  void info_nce_forward(const InfoNceForward&, const InfoNceSizes&, double temperature, DType, int threads);         \
  void info_nce_backward(const InfoNceBackward&, const InfoNceSizes&, double temperature, DType, int threads);       \
  }
FOR_EACH_CPU_ISA(DECLARE_CCPL_CPU)

void launch_neighbor_difference_forward(const NeighborDifferenceForward&, const NeighborDifferenceSizes&, DType,
                                        void* stream);
void launch_neighbor_difference_backward(const NeighborDifferenceBackward&, const NeighborDifferenceSizes&, DType,
                                         void* stream);
void launch_info_nce_forward(const InfoNceForward&, const InfoNceSizes&, double temperature, DType, void* stream);
void launch_info_nce_backward(const InfoNceBackward&, const InfoNceSizes&, double temperature, DType, void* stream);

}  // namespace restoration
