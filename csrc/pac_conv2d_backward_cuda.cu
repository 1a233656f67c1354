// Pixel-adaptive convolution in CUDA, backward. With v = alpha · grad_y and u_t(p)[c] = sum over o of W[o,c,t] v[o](p):
//   grad_x[c](p+t) += k_t(p) u_t(p)[c],   m_t(p) = k_t(p) · sum over c of x[c](p+t) u_t(p)[c],
//   grad_g(p) -= m_t(p) (g(p) - g(p+t)),   grad_g(p+t) += the same,
//   grad_W[o,c,t] = sum over p of v[o](p) k_t(p) x[c](p+t),   grad_b[o] = sum over p of v[o](p);
// m_t is k_t times its gradient; with normalize, k_t is a share of the sum and m_t loses k_t · (sum over r of m_r).
// Every gradient is gathered by the thread that writes it: no atomics, the same bits always. For that k and m, in turn,
// take one plane of sums' width for each tap in scratch memory (36 bytes an output place at K = 3; two where m cannot
// replace k): otherwise a tile would make the products of its neighbours' pixels, up to 16 pixels away, once more.
// Each of x, grad_y and guide is read twice from memory, k three times at most, m once or twice.

#include "pac_conv2d_backward_guide.cuh"
#include "pac_conv2d_backward_input.cuh"
#include "pac_conv2d_backward_shared.cuh"
#include "pac_conv2d_backward_staged.cuh"
#include "pac_conv2d_backward_weight.cuh"

namespace restoration {
namespace {

// Which gradients are made, and where each kernel finds its scratch memory. Addresses are null where it is not needed.
template <typename T>
struct Plan {
  using A = AccumulateType<T>;

  bool makes_product;  // u, for grad_x or the slope; with shared filters also the filter's gradient
  bool makes_sums;     // grad_weight, but for shared filters, or grad_bias
  PackedWeight packed;
  WeightCut cut;
  int64_t filter_shares;
  A* kernel = nullptr;
  A* slope = nullptr;
  void* weight = nullptr;
  A* weight_sums = nullptr;  // of shared filters too
  A* bias_sums = nullptr;

  Plan(const PacConv2dSizes& sizes, const PacConv2dWanted& wanted, void* workspace)
      : makes_product(wanted.x || wanted.guide || (wanted.weight && sizes.shared)),
        makes_sums(wanted.bias || (wanted.weight && !sizes.shared)),
        packed(sizes, kNumbersInWord, kWide),
        cut(sizes, wanted.weight && !sizes.shared, kNumbersInWord, kWide),
        filter_shares(int64_t{shared_grid(sizes).x} * shared_grid(sizes).y),
        carver_(workspace) {
    const int64_t plane = sizes.batch * sizes.taps() * sizes.out_pixels();
    if (makes_product || wanted.weight) kernel = carver_.take<A>(plane);
    if (wanted.guide) slope = replaces_kernel(sizes) ? kernel : carver_.take<A>(plane);
    if (makes_product && !sizes.shared) weight = carver_.take<A>(packed.count(sizes.taps()));
    const int64_t share = sizes.shared ? sizes.taps() : sizes.out_channels * cut.columns;
    if (wanted.weight) weight_sums = carver_.take<A>((sizes.shared ? filter_shares : cut.shares) * share);
    if (wanted.bias) bias_sums = carver_.take<A>(cut.shares * sizes.out_channels);
  }

  int64_t bytes() const { return carver_.used(); }

 private:
  static constexpr bool kWide = std::is_same_v<T, double>;
  static constexpr int kNumbersInWord = sizeof(T) == 2 ? 2 : 1;

  // Whether each k is read for the last time by the thread that writes its m.
  bool replaces_kernel(const PacConv2dSizes& sizes) const {
    return !sizes.normalize && sizes.channels <= (sizes.shared ? kSharedChannels : packed.channels);
  }

  Carver carver_;
};

// Factor: how operands are multiplied.
template <typename T, typename R, typename Factor>
void launch(const PacConv2dBackward& arguments, const PacConv2dSizes& sizes, const Plan<T>& plan, cudaStream_t stream) {
  using Element = typename Operand<Factor>::Element;
  static_assert(sizeof(Element) == sizeof(AccumulateType<T>), "the plan counts operands as sums");
  const PacMap map(sizes);
  if (sizes.batch > 0 && plan.kernel != nullptr) {
    LAUNCH(pac_conv2d_backward_affinity_kernel<T>, place_grid(map.out_pixels, map.batch), dim3(kPlaceThreads), 0,
           stream, static_cast<const T*>(arguments.guide), plan.kernel, map);
  }
  // Before m takes the place of k.
  if (plan.makes_sums) {
    launch_weight<T, R, Factor>(arguments, plan.kernel, plan.weight_sums, plan.bias_sums, plan.cut, map, stream);
  }
  if (sizes.batch > 0 && plan.makes_product) {
    if (sizes.shared) {
      launch_shared<T, R>(arguments, sizes, plan.kernel, plan.slope, plan.weight_sums, map, stream);
    } else {
      Element* const packed = static_cast<Element*>(plan.weight);
      launch_pack<T, Factor>(arguments.weight, packed, plan.packed, map, stream);
      bool staged = false;
      if constexpr (!Operand<Factor>::kExact) {
        staged = launch_staged<T, R, Factor>(arguments, packed, plan.kernel, plan.slope, plan.packed, map, stream);
      }
      if (!staged) {
        launch_input<T, R, Factor>(arguments, packed, plan.kernel, plan.slope, plan.packed, map, stream);
      }
    }
  }
  if (sizes.batch > 0 && plan.slope != nullptr) {
    if (sizes.normalize) {
      LAUNCH(pac_conv2d_backward_centre_kernel<AccumulateType<T>>, place_grid(map.out_pixels, map.batch),
             dim3(kPlaceThreads), 0, stream, plan.kernel, plan.slope, map);
    }
    LAUNCH(pac_conv2d_backward_guide_kernel<T>, place_grid(map.pixels, map.batch), dim3(kPlaceThreads), 0, stream,
           static_cast<const T*>(arguments.guide), plan.slope, static_cast<T*>(arguments.grad_guide), map);
  }
  if (arguments.grad_weight != nullptr && sizes.shared) {
    launch_reduce<T>(plan.weight_sums, arguments.grad_weight, plan.filter_shares, 1, 1, map.taps, arguments.alpha,
                     stream);
  } else if (arguments.grad_weight != nullptr) {
    launch_reduce<T>(plan.weight_sums, arguments.grad_weight, plan.cut.shares, sizes.out_channels, map.channels,
                     map.taps, arguments.alpha, stream);
  }
  if (arguments.grad_bias != nullptr) {
    launch_reduce<T>(plan.bias_sums, arguments.grad_bias, plan.cut.shares, sizes.out_channels, 1, 1, arguments.alpha,
                     stream);
  }
}

}  // namespace

int64_t pac_conv2d_backward_workspace(const PacConv2dSizes& sizes, const PacConv2dWanted& wanted, DType dtype) {
  int64_t bytes = 0;
  dispatch_cuda_dtype("pac_conv2d", dtype, [&](auto tag) {
    bytes = Plan<typename decltype(tag)::Type>(sizes, wanted, nullptr).bytes();
  });
  return bytes;
}

void launch_pac_conv2d_backward(const PacConv2dBackward& arguments, const PacConv2dSizes& sizes, bool allow_tf32,
                                DType dtype, DType output_dtype, void* workspace, void* stream) {
  const PacConv2dWanted wanted = {arguments.grad_x != nullptr, arguments.grad_guide != nullptr,
                                  arguments.grad_weight != nullptr, arguments.grad_bias != nullptr};
  const auto on = static_cast<cudaStream_t>(stream);
  dispatch_cuda_dtype("pac_conv2d", dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const Plan<T> plan(sizes, wanted, workspace);
    if constexpr (sizeof(T) == 2) {
      if (output_dtype == DType::float32) return launch<T, float, T>(arguments, sizes, plan, on);
    }
    if (output_dtype != dtype) refuse_dtype("pac_conv2d", output_dtype);
    if constexpr (std::is_same_v<T, float>) {
      if (allow_tf32) return launch<T, T, Tf32>(arguments, sizes, plan, on);
    }
    launch<T, T, T>(arguments, sizes, plan, on);
  });
}

}  // namespace restoration
