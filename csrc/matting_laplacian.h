// Matting Laplacian M of a guide (Levin, Lischinski, Weiss 2008, eq. 12; as a loss Sun 2025, eq. 9). In each window w
// of n = (2·radius+1)² pixels inside the image, C_w (n x 3) the guide's colours and x_w the values of one channel, both
// less their mean, a_w minimises |x_w - C_w a_w|² + eps |a_w|², and r_w = x_w - C_w a_w. Then
//   (M x)_i = sum over windows that contain i of r_w[i],    x^T M x = sum over windows of |r_w|² + eps |a_w|².
// Here: the mathematics of one window that the CPU and the CUDA kernels share, the arguments, and the entry points.
#pragma once

#include <type_traits>

#include "common.h"

namespace restoration {

struct MattingLaplacianSizes {
  int64_t batch;
  int64_t channels;
  int64_t height;
  int64_t width;
  int64_t radius;  // 1, 2 or 3

  int64_t pixels() const { return height * width; }
  int64_t window_rows() const { return height > 2 * radius ? height - 2 * radius : 0; }
  int64_t window_columns() const { return width > 2 * radius ? width - 2 * radius : 0; }
};

// image and product [B,C,H,W], guide [B,3,H,W] and energy [B] are of the call's dtype, float32 or float64.
struct MattingLaplacian {
  const void* image;
  const void* guide;
  void* product;  // factor · M x, null where it is not wanted
  void* energy;   // sum over channels of x^T M x / (H·W), null where it is not wanted
  double factor;
  double eps;
};

// Values of one window less their mean. The centre pixel goes first: what is left is small where the image is flat, and
// rounds less.
template <typename Real, int kPixels>
HOST_DEVICE void centre_window(Real (&values)[kPixels]) {
  const Real centre = values[kPixels / 2];
  Real sum = {};
  UNROLL
  for (int pixel = 0; pixel < kPixels; ++pixel) {
    values[pixel] -= centre;
    sum += values[pixel];
  }
  const Real mean = sum * (1.0 / kPixels);
  UNROLL
  for (int pixel = 0; pixel < kPixels; ++pixel) values[pixel] -= mean;
}

// The colours of one window, over √eps·Id, as three orthogonal columns of n + 3 numbers. What an ordinary least squares
// fit by them leaves of x_w over three zeros is r_w over -√eps·a_w. The columns come from modified Gram-Schmidt,
// without the 3x3 covariance: that of nearly grey colours is nearly singular, and its condition is the square of the
// columns'. Real is a float64 number, a vector of them that holds a window in each lane, or a TwoFloat.
template <typename Real, int kPixels>
struct WindowBasis {
  Real colours[3][kPixels];
  Real slopes[3][3];  // the last three numbers of each column; upper triangular, so slopes[k][j] is zero for j > k
  Real inverse_squares[3];

  // `colours` holds the centred colours.
  template <typename Number>
  HOST_DEVICE void orthogonalise(Number root_eps) {
    UNROLL
    for (int column = 0; column < 3; ++column) {
      UNROLL
      for (int slope = 0; slope < 3; ++slope) slopes[column][slope] = Real{};
      slopes[column][column] += root_eps;
    }
    UNROLL
    for (int column = 0; column < 3; ++column) {
      UNROLL
      for (int earlier = 0; earlier < column; ++earlier) take_out(earlier, colours[column], slopes[column]);
      // At least eps, because the columns of √eps·Id are orthogonal.
      inverse_squares[column] = 1.0 / square(colours[column], slopes[column]);
    }
  }

  // Turns the centred values of a window into r_w; returns |r_w|² + eps |a_w|².
  HOST_DEVICE Real residuals(Real (&values)[kPixels]) const {
    Real slopes_of_values[3] = {};
    UNROLL
    for (int column = 0; column < 3; ++column) take_out(column, values, slopes_of_values);
    return square(values, slopes_of_values);
  }

 private:
  // Subtracts the component along a column. Entries of `slopes_of_values` from that column on are still zero or
  // orthogonal to it.
  HOST_DEVICE void take_out(int column, Real (&values)[kPixels], Real (&slopes_of_values)[3]) const {
    Real component = {};
    UNROLL
    for (int pixel = 0; pixel < kPixels; ++pixel) component += colours[column][pixel] * values[pixel];
    UNROLL
    for (int slope = 0; slope < column; ++slope) component += slopes[column][slope] * slopes_of_values[slope];
    component *= inverse_squares[column];
    UNROLL
    for (int pixel = 0; pixel < kPixels; ++pixel) values[pixel] -= component * colours[column][pixel];
    UNROLL
    for (int slope = 0; slope <= column; ++slope) slopes_of_values[slope] -= component * slopes[column][slope];
  }

  HOST_DEVICE static Real square(const Real (&values)[kPixels], const Real (&slopes_of_values)[3]) {
    Real sum = {};
    UNROLL
    for (int slope = 0; slope < 3; ++slope) sum += slopes_of_values[slope] * slopes_of_values[slope];
    UNROLL
    for (int pixel = 0; pixel < kPixels; ++pixel) sum += values[pixel] * values[pixel];
    return sum;
  }
};

template <int kRadius>
using RadiusTag = std::integral_constant<int, kRadius>;

// Calls call(type tag, radius tag). Half precision is widened in Python, which has also checked the radius.
template <typename Call>
void dispatch_matting_laplacian(DType dtype, int64_t radius, Call call) {
  const auto with_type = [&](auto tag) {
    if (radius == 1) return call(tag, RadiusTag<1>());
    if (radius == 2) return call(tag, RadiusTag<2>());
    return call(tag, RadiusTag<3>());
  };
  if (dtype == DType::float32) return with_type(TypeTag<float>());
  if (dtype == DType::float64) return with_type(TypeTag<double>());
  refuse_dtype("matting_laplacian", dtype);
}

#define DECLARE_MATTING_LAPLACIAN_CPU(isa)                                                           \
  namespace isa {                                                                                    \
  void matting_laplacian(const MattingLaplacian&, const MattingLaplacianSizes&, DType, int threads); \
  }
FOR_EACH_CPU_ISA(DECLARE_MATTING_LAPLACIAN_CPU)

// Bytes of scratch memory on the device that the launcher needs.
int64_t matting_laplacian_workspace(const MattingLaplacianSizes&, DType);
void launch_matting_laplacian(const MattingLaplacian&, const MattingLaplacianSizes&, DType, void* workspace,
                              void* stream);

}  // namespace restoration
