// Pixel-adaptive convolution in CUDA, forward: formula in pac_conv2d.h.
// An implicit product [pixels, K²·C] · [K²·C, O]. A block owns a tile of pixels and one or more tiles of outputs. It
// computes the tile's k_t(p) into shared memory and walks over taps and channels: while one buffer is multiplied
// (pac_conv2d_products.cuh), the next channels of x and weights are copied into the other. Neither k nor columns reach
// main memory. Read: x and guide K times, but for the first time from the caches; written: y once.
// Scratch memory: one copy of weight, in the order in which it is multiplied. No atomics: the same bits every run.

#include "pac_conv2d_products.cuh"

namespace restoration {
namespace {

// Blocks that keep every multiprocessor of the largest GPU (132 of Hopper) busy, four on each. With fewer tiles of
// pixels than that, tiles of outputs go to blocks of their own, each of which computes the kernel again.
constexpr int64_t kWantedBlocks = 4 * 132;

// A kernel up to this size is kept for all tiles of outputs, and both buffers of x are no larger than that where planes
// can be fewer: two or three blocks then fit into the 100 KB of a multiprocessor of compute capability 8.6.
constexpr int64_t kKeptKernelBytes = 16 << 10;
constexpr int64_t kStagedBytes = 18 << 10;

// The sums of one round on their way through shared memory, in which threads swap them so that each warp writes
// neighbouring pixels of y, and none needs all of its sums' addresses at once.
template <typename Products>
struct FinishedSums {
  using A = typename Products::A;
  static constexpr int kOutputs = Products::kOutputs / Products::kRounds;
  static constexpr int kStride = Products::kPixels + 4;  // spreads the outputs of a fragment over the banks
  static constexpr int kCount = kOutputs * kStride;
  // Outputs whose residuals are under way together: y may be their memory, so that no load moves up above a store.
  static constexpr int kTogether = 4;

  template <typename T>
  __device__ static void store(const Products& products, int round, const PacConv2dTiling& tiling,
                               const TilePlace& place, int first_channel, const PacConv2dEpilogue<T>& epilogue,
                               A* sums) {
#pragma unroll
    for (int i = 0; i < Products::kOwnPixels; ++i) {
#pragma unroll
      for (int j = 0; j < Products::kOwnOutputs; ++j) {
        sums[Products::output(j) * kStride + Products::pixel(i)] = products.sum(round, i, j);
      }
    }
    __syncthreads();
    const int outputs = min(kOutputs, tiling.out_channels - first_channel);
    for (int pixel = threadIdx.x; pixel < Products::kPixels; pixel += Products::kThreads) {
      const int row = place.row + tiling.row_of(pixel), column = place.column + tiling.column_of(pixel);
      if (row >= tiling.vertical.output || column >= tiling.horizontal.output) continue;
      int64_t offset = (place.image * tiling.out_channels + first_channel) * tiling.out_pixels() +
                       row * tiling.horizontal.output + column;
      const int64_t step = tiling.out_pixels();
#pragma unroll 1
      for (int first = 0; first < outputs; first += kTogether, offset += kTogether * step) {
        A residuals[kTogether], values[kTogether];
#pragma unroll
        for (int part = 0; part < kTogether; ++part) {
          const int output = min(first + part, outputs - 1);
          residuals[part] = epilogue.residual_of(offset + (output - first) * step);
          values[part] = sums[output * kStride + pixel] + epilogue.bias_of(first_channel + output);
        }
#pragma unroll
        for (int part = 0; part < kTogether; ++part) {
          if (first + part < outputs) epilogue.store(values[part], residuals[part], offset + part * step);
        }
      }
    }
    __syncthreads();  // before the sums are overwritten
  }
};

// How the work of one call is cut; the same for the kernel that packs weights and the one that multiplies.
template <typename Products>
struct Plan {
  using Element = typename Products::Element;
  using A = typename Products::A;

  PacConv2dTiling tiling;
  int planes;  // of x, staged together
  int plane_stride;
  int slabs;  // of planes
  int64_t pixel_tiles;
  int output_tiles;
  int output_blocks;  // that share the tiles of outputs of one tile of pixels
  bool is_usual;      // 3 x 3 taps, whose k are computed at once: that reads and addresses the guide least often
  bool keeps_kernel;  // for all tiles of outputs

  explicit Plan(const PacConv2dSizes& sizes) : tiling(sizes, Products::kPixels) {
    // An odd multiple of 4: the planes that the lanes of a fragment read together then lie in different banks.
    plane_stride = (tiling.rows() * tiling.span + 3) / 8 * 8 + 4;
    const int64_t all_planes = ceil_divide(sizes.channels, Products::kChannels);
    if (Products::kPlanes > 0) {
      planes = Products::kPlanes;
    } else if (Products::kShared) {
      planes = static_cast<int>(std::min<int64_t>(all_planes, kStagedPlanes));
    } else {
      const int64_t fitting = kStagedBytes / (2 * plane_stride * int64_t{sizeof(Element)});
      // Slabs of equal size: 12 channels are 2 times 6.
      const int64_t most = std::clamp<int64_t>(fitting, 1, kStagedPlanes);
      planes = static_cast<int>(ceil_divide(all_planes, ceil_divide(all_planes, most)));
    }
    slabs = Products::kShared ? 1 : static_cast<int>(ceil_divide(all_planes, planes));
    output_tiles = static_cast<int>(ceil_divide(sizes.out_channels, Products::kOutputs));
    pixel_tiles = tiling.tiles(sizes.batch);
    const int64_t enough = ceil_divide(kWantedBlocks, std::max<int64_t>(pixel_tiles, 1));
    output_blocks = static_cast<int>(std::min<int64_t>({output_tiles, enough, kMaximumGridY}));
    const int64_t kernel_bytes = sizes.taps() * Products::kPixels * int64_t{sizeof(A)};
    is_usual = sizes.kernel_size == kTapsTogether;
    keeps_kernel = is_usual || (output_tiles > output_blocks && kernel_bytes <= kKeptKernelBytes);
  }

  // Weights of one step of a product, which takes kTapsPerStep taps of a group.
  HOST_DEVICE int step_weights() const { return planes * Products::kTapsPerStep * Products::kOutputs; }
  HOST_DEVICE static int steps(int taps) { return ceil_divide(taps, Products::kTapsPerStep); }
  // Of a row of taps: whole groups, and one of the rest.
  HOST_DEVICE int row_steps() const {
    return tiling.kernel_size / kTapsTogether * steps(kTapsTogether) + steps(tiling.kernel_size % kTapsTogether);
  }
  HOST_DEVICE int64_t tile_weights() const {
    return static_cast<int64_t>(tiling.kernel_size) * row_steps() * slabs * step_weights();
  }
  // Numbers in shared memory: of one buffer, and of k.
  HOST_DEVICE int staged_weights() const {
    return Products::kShared ? 0 : steps(min(tiling.kernel_size, kTapsTogether)) * step_weights();
  }
  HOST_DEVICE int staged() const { return planes * plane_stride; }
  HOST_DEVICE int kernel() const {
    return (keeps_kernel ? tiling.taps() : min(tiling.kernel_size, kTapsTogether)) * Products::kKernelStride;
  }
  HOST_DEVICE int totals() const { return tiling.normalize ? Products::kPixels : 0; }

  size_t shared_bytes() const {
    const size_t stages = 2 * (staged_weights() + staged()) * sizeof(Element);
    return (kernel() + totals()) * sizeof(A) + std::max(stages, FinishedSums<Products>::kCount * sizeof(A));
  }
};

// packed[tile of outputs, row of taps, slab, step, plane and output in the order of the products], 0 beyond the last.
template <typename Products, typename T>
__global__ void pac_conv2d_pack_kernel(Plan<Products> plan, const T* __restrict__ weight,
                                       typename Products::Element* __restrict__ packed) {
  using A = typename Products::A;
  const int taps = plan.tiling.kernel_size;
  const int64_t count = plan.output_tiles * plan.tile_weights();
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; index < count; index += step) {
    int plane, output;
    Products::source(static_cast<int>(index % plan.step_weights()), plane, output);
    const int64_t block = index / plan.step_weights();
    const int step = static_cast<int>(block % plan.row_steps());
    const int slab = static_cast<int>(block / plan.row_steps() % plan.slabs);
    const int tap_row = static_cast<int>(block / plan.row_steps() / plan.slabs % taps);
    const int first = step / plan.steps(kTapsTogether) * kTapsTogether;
    const int tap = first + step % plan.steps(kTapsTogether) * Products::kTapsPerStep + plane / plan.planes;
    const bool is_tap = tap < min(first + kTapsTogether, taps);
    const int out_channel = static_cast<int>(index / plan.tile_weights()) * Products::kOutputs + output;
    A values[Products::kChannels];
#pragma unroll
    for (int part = 0; part < Products::kChannels; ++part) {
      const int channel = (slab * plan.planes + plane % plan.planes) * Products::kChannels + part;
      const bool exists = is_tap && out_channel < plan.tiling.out_channels && channel < plan.tiling.channels;
      const int64_t filter = static_cast<int64_t>(out_channel) * plan.tiling.channels + channel;
      values[part] = exists ? static_cast<A>(weight[(filter * taps + tap_row) * taps + tap]) : A(0);
    }
    packed[index] = Products::pack(values);
  }
}

// weights: packed, or the one filter that all channels share.
template <typename Products, typename T, typename Weight>
__global__ void __launch_bounds__(Products::kThreads, Products::kBlocks)
    pac_conv2d_forward_kernel(Plan<Products> plan, const T* __restrict__ x, const T* __restrict__ guide,
                              const Weight* __restrict__ weights, PacConv2dEpilogue<T> epilogue) {
  using Element = typename Products::Element;
  using A = typename Products::A;
  constexpr int kThreads = Products::kThreads;
  const PacConv2dTiling& tiling = plan.tiling;
  const TilePlace place(tiling);

  DYNAMIC_SHARED(Vector<A>, memory);
  A* const kernel = memory->values;
  A* const totals = tiling.normalize ? kernel + plan.kernel() : nullptr;
  A* const sums = kernel + plan.kernel() + plan.totals();  // in place of the stages, once they have been multiplied
  Element* const weight_buffers = reinterpret_cast<Element*>(sums);
  Element* const staged_buffers = weight_buffers + 2 * plan.staged_weights();
  if (tiling.normalize) fill_totals<Products>(guide, tiling, place, totals, kernel);
  if (plan.is_usual) {
    fill_kernel<Products, kTapsTogether, false>(guide, tiling, place, {0, 0, kTapsTogether}, totals, kernel);
  }

  int slots[Products::kOwnPixels];
#pragma unroll
  for (int i = 0; i < Products::kOwnPixels; ++i) slots[i] = tiling.slot(Products::pixel(i));

#pragma unroll 1
  for (int tile = blockIdx.y; tile < plan.output_tiles; tile += gridDim.y) {
    const auto start = [&](const TapGroup& group, int slab, int buffer) {
      const int first_channel = (Products::kShared ? tile * kStagedPlanes : slab * plan.planes) * Products::kChannels;
      stage_rows<kThreads>(x, tiling, place, group, first_channel, plan.planes, plan.plane_stride,
                           staged_buffers + buffer * plan.staged());
      if constexpr (!Products::kShared) {
        constexpr int kCount = Vector<Element>::kCount;
        const int64_t step = static_cast<int64_t>(group.row * plan.slabs + slab) * plan.row_steps() +
                             group.first / kTapsTogether * plan.steps(kTapsTogether);
        const Element* const source = weights + tile * plan.tile_weights() + step * plan.step_weights();
        const int count = plan.steps(group.count) * plan.step_weights();
        Element* const destination = weight_buffers + buffer * plan.staged_weights();
        for (int index = threadIdx.x * kCount; index < count; index += kThreads * kCount) {
          copy_async<kVectorBytes>(destination + index, source + index, true);
        }
      }
    };

    // A stage is a group of taps and a slab of planes. The first round of the loop only starts the copies of the first.
    Products products;
    TapGroup group = {0, 0, 0}, next_group = tiling.group(0, 0);
    int slab = 0, next_slab = 0, buffer = 1;
#pragma unroll 1
    while (group.row < tiling.kernel_size) {
      buffer ^= 1;
      if (next_group.row < tiling.kernel_size) start(next_group, next_slab, buffer);
      commit_copies();
      if (group.count > 0) {
        const int first_tap = group.row * tiling.kernel_size + group.first;
        A* const group_kernel = kernel + (plan.keeps_kernel ? first_tap * Products::kKernelStride : 0);
        if (slab == 0 && !plan.is_usual && (!plan.keeps_kernel || tile == static_cast<int>(blockIdx.y))) {
          fill_kernel<Products, 1, false>(guide, tiling, place, group, totals, group_kernel);
        }
        wait_for_copies<1>();
        __syncthreads();
        const Element* const staged = staged_buffers + (buffer ^ 1) * plan.staged();
        if constexpr (Products::kShared) {
          products.multiply(group.count, tiling.tap_step, staged, plan.planes, plan.plane_stride, weights + first_tap,
                            group_kernel, slots);
        } else {
          products.multiply(group.count, tiling.tap_step, staged, plan.planes, plan.plane_stride,
                            weight_buffers + (buffer ^ 1) * plan.staged_weights(), group_kernel, slots);
        }
        __syncthreads();  // before the buffer, or the group's kernel, is overwritten
      }
      group = next_group;
      slab = next_slab;
      if (++next_slab == plan.slabs) {
        next_slab = 0;
        next_group = tiling.after(next_group);
      }
    }
#pragma unroll
    for (int round = 0; round < Products::kRounds; ++round) {
      FinishedSums<Products>::store(products, round, tiling, place,
                                    tile * Products::kOutputs + round * FinishedSums<Products>::kOutputs, epilogue,
                                    sums);
    }
  }
}

constexpr int kPackThreads = 256;

template <typename Products>
int64_t workspace_bytes(const PacConv2dSizes& sizes) {
  const Plan<Products> plan(sizes);
  return plan.output_tiles * plan.tile_weights() * int64_t{sizeof(typename Products::Element)};
}

template <typename Products, typename T, typename Weight>
void launch_products(const Plan<Products>& plan, const PacConv2dForward& arguments, const Weight* weights, bool wide,
                     cudaStream_t stream) {
  const auto kernel = pac_conv2d_forward_kernel<Products, T, Weight>;
  const size_t bytes = plan.shared_bytes();
  allow_shared(kernel, bytes);
  const dim3 grid(grid_x(plan.pixel_tiles), plan.output_blocks);
  LAUNCH(kernel, grid, dim3(Products::kThreads), bytes, stream, plan, static_cast<const T*>(arguments.x),
         static_cast<const T*>(arguments.guide), weights, PacConv2dEpilogue<T>(arguments, wide));
}

template <typename Products, typename T>
void launch_forward(const PacConv2dForward& arguments, const PacConv2dSizes& sizes, bool wide, void* workspace,
                    cudaStream_t stream) {
  using Element = typename Products::Element;
  const Plan<Products> plan(sizes);
  const T* const weight = static_cast<const T*>(arguments.weight);
  if constexpr (Products::kShared) {
    launch_products<Products, T>(plan, arguments, weight, wide, stream);
  } else {
    Element* const packed = static_cast<Element*>(workspace);
    const int64_t blocks = ceil_divide(plan.output_tiles * plan.tile_weights(), kPackThreads);
    LAUNCH((pac_conv2d_pack_kernel<Products, T>), dim3(grid_y(blocks)), dim3(kPackThreads), 0, stream, plan, weight,
           packed);
    launch_products<Products, T>(plan, arguments, static_cast<const Element*>(packed), wide, stream);
  }
}

// Those of the network's first layer. A fragment then holds two taps of float32, or four of 16-bit numbers.
constexpr int kFewChannels = 4;

// Calls call(type of x, products).
template <typename Call>
void choose_products(const PacConv2dSizes& sizes, bool allow_tf32, DType dtype, Call call) {
  dispatch_cuda_dtype("pac_conv2d", dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if (sizes.shared) return call(tag, TypeTag<SharedProducts<T>>());
    // Tiles of 64 outputs waste most of their products on fewer than 32.
    const bool narrow = sizes.out_channels <= 32;
    const bool few = narrow && sizes.channels <= kFewChannels;
    if constexpr (std::is_same_v<T, double>) {
      call(tag, TypeTag<ExactProducts<T, 32, 4, 4, 4>>());
    } else {
      if constexpr (std::is_same_v<T, float>) {
        // Between few channels and a full fragment, most of it would be empty.
        if (!allow_tf32 || (sizes.channels < kStagedPlanes && !few)) {
          if (narrow) return call(tag, TypeTag<ExactProducts<T, 64, 2, 8, 8>>());
          return call(tag, TypeTag<ExactProducts<T, 16, 8, 8, 8>>());
        }
      }
      if (few) return call(tag, TypeTag<FragmentProducts<T, 16, kFewChannels / Staged<T>::kChannels>>());
      if (narrow) return call(tag, TypeTag<FragmentProducts<T, 16>>());
      call(tag, TypeTag<FragmentProducts<T, 64>>());
    }
  });
}

}  // namespace

int64_t pac_conv2d_forward_workspace(const PacConv2dSizes& sizes, bool allow_tf32, DType dtype) {
  int64_t bytes = 0;
  choose_products(sizes, allow_tf32, dtype,
                  [&](auto, auto products) { bytes = workspace_bytes<typename decltype(products)::Type>(sizes); });
  return bytes;
}

void launch_pac_conv2d_forward(const PacConv2dForward& arguments, const PacConv2dSizes& sizes, bool allow_tf32,
                               DType dtype, DType output_dtype, void* workspace, void* stream) {
  if (output_dtype != dtype && (output_dtype != DType::float32 || dtype == DType::float64)) {
    refuse_dtype("pac_conv2d", output_dtype);
  }
  if (sizes.batch == 0) return;
  choose_products(sizes, allow_tf32, dtype, [&](auto tag, auto products) {
    using T = typename decltype(tag)::Type;
    using Products = typename decltype(products)::Type;
    launch_forward<Products, T>(arguments, sizes, output_dtype != dtype, workspace, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace restoration
