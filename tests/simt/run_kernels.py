"""Runs the kernels of the module given as argument, which simt_build compiled with a check of memory, on odd shapes.

Of all dtypes, or of those named as further arguments; the Matting Laplacian of both that it has.
Arrays are of exactly the size that a kernel may touch. Without torch, whose own libraries no check need watch.
"""

import importlib.machinery
import importlib.util
import itertools
import sys

import numpy

loader = importlib.machinery.ExtensionFileLoader("_simt", sys.argv[1])
extension = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
loader.exec_module(extension)

BYTES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
DTYPES = sys.argv[2:] or list(BYTES)


# Whether arrays begin with a second number, as views do: no place for the widest vectors. Scratch memory never does.
misaligned = False


def array(count, bytes_each):
    skipped = bytes_each if misaligned and bytes_each > 1 else 0
    return numpy.zeros(skipped + count * bytes_each, numpy.uint8)[skipped:]


def dual_pool_attention(batch, channels, height, width, dtype):
    size, accumulate_size, taps = BYTES[dtype], max(4, BYTES[dtype]), 5
    sizes = {"batch": batch, "channels": channels, "height": height, "width": width, "dtype": extension.DTYPES[dtype]}
    elements = batch * channels * height * width
    arrays = {
        **{name: array(elements, size) for name in ("x", "y", "grad_y", "grad_x")},
        **{name: array(taps, size) for name in ("weight", "grad_weight")},
        **{name: array(batch * channels, accumulate_size) for name in ("mean", "scale")},
        "workspace": array(extension.dual_pool_attention_workspace_cuda(**sizes), 1),
    }
    addresses = {name: values.ctypes.data for name, values in arrays.items()}
    forward = {name: addresses[name] for name in ("x", "weight", "y", "mean", "scale")}
    backward = {name: addresses[name] for name in ("grad_y", "x", "weight", "mean", "scale", "grad_x", "grad_weight")}
    options = {**sizes, "taps": taps, "pool_size": 50}
    device = {"workspace": addresses["workspace"], "stream": 0}
    extension.dual_pool_attention_forward_cuda(**forward, **options, **device)
    extension.dual_pool_attention_backward_cuda(**backward, **options, **device)
    if dtype != "float16":
        extension.dual_pool_attention_forward_cpu(**forward, **options, threads=2)
        extension.dual_pool_attention_backward_cpu(**backward, **options, threads=2)


def dual_pool_attention_pad2d(batch, channels, height, width, padding, dtype, output_dtype):
    size, output_size, accumulate_size, taps = BYTES[dtype], BYTES[output_dtype], max(4, BYTES[dtype]), 5
    padded = batch * channels * (height + 2 * padding) * (width + 2 * padding)
    arrays = {
        **{name: array(batch * channels * height * width, size) for name in ("x", "grad_addend", "grad_x")},
        **{name: array(padded, output_size) for name in ("y", "grad_y")},
        **{name: array(taps, size) for name in ("weight", "grad_weight")},
        **{name: array(batch * channels, accumulate_size) for name in ("mean", "scale")},
    }
    addresses = {name: values.ctypes.data for name, values in arrays.items()}
    common = {name: addresses[name] for name in ("x", "weight", "mean", "scale")}
    common.update(batch=batch, channels=channels, height=height, width=width, taps=taps, pool_size=50, padding=padding)
    common.update(dtype=extension.DTYPES[dtype], output_dtype=extension.DTYPES[output_dtype])
    gradients = {name: addresses[name] for name in ("grad_y", "grad_addend", "grad_x", "grad_weight")}
    sizes = {name: common[name] for name in ("batch", "channels", "height", "width", "dtype")}
    workspace = array(extension.dual_pool_attention_pad2d_workspace_cuda(**sizes), 1)
    device = {"workspace": workspace.ctypes.data, "stream": 0}
    extension.dual_pool_attention_pad2d_forward_cuda(**common, y=addresses["y"], **device)
    extension.dual_pool_attention_pad2d_backward_cuda(**common, **gradients, **device)
    if "float16" not in (dtype, output_dtype):
        extension.dual_pool_attention_pad2d_forward_cpu(**common, y=addresses["y"], threads=2)
        extension.dual_pool_attention_pad2d_backward_cpu(**common, **gradients, threads=2)


def relu_split(batch, channels, split, height, width, dtype):
    pixels = batch * height * width
    arrays = {
        **{name: array(pixels * channels, BYTES[dtype]) for name in ("x", "grad_x")},
        **{name: array(pixels * split, BYTES[dtype]) for name in ("rectified", "grad_rectified")},
        **{name: array(pixels * (channels - split), BYTES[dtype]) for name in ("rest", "grad_rest")},
    }
    addresses = {name: values.ctypes.data for name, values in arrays.items()}
    sizes = {"batch": batch, "channels": channels, "split": split, "height": height, "width": width}
    options = {**sizes, "dtype": extension.DTYPES[dtype]}
    forward = {**{name: addresses[name] for name in ("x", "rectified", "rest")}, **options}
    backward = {**{name: addresses[name] for name in addresses if name not in ("x", "rest")}, **options}
    extension.relu_split_forward_cuda(**forward, stream=0)
    extension.relu_split_backward_cuda(**backward, stream=0)
    if dtype != "float16":
        extension.relu_split_forward_cpu(**forward, threads=2)
        extension.relu_split_backward_cpu(**backward, threads=2)


def matting_laplacian(batch, channels, height, width, radius, dtype):
    size = BYTES[dtype]
    sizes = {"batch": batch, "channels": channels, "height": height, "width": width, "radius": radius}
    sizes["dtype"] = extension.DTYPES[dtype]
    arrays = {
        **{name: array(batch * channels * height * width, size) for name in ("image", "product")},
        "guide": array(batch * 3 * height * width, size),
        "energy": array(batch, size),
    }
    workspace = array(extension.matting_laplacian_workspace_cuda(**sizes), 1)
    options = {**{name: values.ctypes.data for name, values in arrays.items()}, **sizes, "factor": 1.0, "eps": 1e-7}
    extension.matting_laplacian_cuda(**options, workspace=workspace.ctypes.data, stream=0)
    extension.matting_laplacian_cpu(**options, threads=2)


def neighbor_difference(batch, channels, height, width, anchors, dtype, channels_last):
    size, places = BYTES[dtype], height * width
    sizes = {"batch": batch, "channels": channels, "map_places": places, "anchors": anchors}
    sizes.update(channel_stride=1 if channels_last else places, place_stride=channels if channels_last else 1)
    # The last place of the map repeats, as do others.
    entries = numpy.sort(numpy.arange(anchors * 9) * 7 % places)
    entries[-2:] = places - 1
    order = numpy.arange(anchors * 9)[::-1].copy()
    maps = array(batch * channels * places, size)
    differences = array(batch * anchors * 8 * channels, size)
    options = {**sizes, "places": entries.ctypes.data, "dtype": extension.DTYPES[dtype]}
    forward = {"x": maps.ctypes.data, "y": differences.ctypes.data, **options}
    backward = {"grad_y": differences.ctypes.data, "grad_x": maps.ctypes.data, "order": order.ctypes.data, **options}
    extension.neighbor_difference_forward_cuda(**forward, stream=0)
    extension.neighbor_difference_backward_cuda(**backward, stream=0)
    if size >= 4:
        extension.neighbor_difference_backward_cuda(**{**backward, "order": 0}, stream=0)
    if dtype != "float16":
        extension.neighbor_difference_forward_cpu(**forward, threads=2)
        extension.neighbor_difference_backward_cpu(**backward, threads=2)


def info_nce(batch, rows, width, dtype):
    size, accumulate_size = BYTES[dtype], max(4, BYTES[dtype])
    arrays = {
        **{name: array(batch * rows * width, size) for name in ("query", "key", "grad_query")},
        **{name: array(batch * rows, accumulate_size) for name in ("loss", "log_sum", "grad_loss")},
    }
    addresses = {name: values.ctypes.data for name, values in arrays.items()}
    sizes = {"batch": batch, "rows": rows, "width": width}
    options = {**sizes, "temperature": 0.07, "dtype": extension.DTYPES[dtype]}
    forward = {**{name: addresses[name] for name in ("query", "key", "loss", "log_sum")}, **options}
    backward = {**{name: addresses[name] for name in addresses if name != "loss"}, **options}
    extension.info_nce_forward_cuda(**forward, stream=0)
    extension.info_nce_backward_cuda(**backward, stream=0)
    if dtype != "float16":
        extension.info_nce_forward_cpu(**forward, threads=2)
        extension.info_nce_backward_cpu(**backward, threads=2)


def pac_conv2d(batch, channels, outputs, height, width, taps, stride, padding, dilation, dtype, allow_tf32=False):
    """outputs of 0: one filter shared by all channels."""
    size, guides, shared = BYTES[dtype], 3, outputs == 0
    outputs = outputs or channels
    out_height, out_width = ((side + 2 * padding - dilation * (taps - 1) - 1) // stride + 1 for side in (height, width))
    arrays = {
        "x": array(batch * channels * height * width, size),
        "guide": array(batch * guides * height * width, size),
        "weight": array((1 if shared else outputs * channels) * taps**2, size),
        "bias": array(outputs, size),
        "y": array(batch * outputs * out_height * out_width, size),
    }
    sizes = {
        "batch": batch,
        "channels": channels,
        "guide_channels": guides,
        "out_channels": outputs,
        "height": height,
        "width": width,
        "kernel_size": taps,
        "stride": (stride, stride),
        "padding": (padding, padding),
        "dilation": (dilation, dilation),
        "normalize": True,
        "shared": shared,
        "allow_tf32": allow_tf32,
        "dtype": extension.DTYPES[dtype],
    }
    arrays["workspace"] = array(extension.pac_conv2d_forward_workspace_cuda(**sizes), 1)
    addresses = {name: values.ctypes.data for name, values in arrays.items()}
    options = {"alpha": 1.0, "quantum": 0.25, "output_dtype": sizes["dtype"], "stream": 0}
    extension.pac_conv2d_forward_cuda(**addresses, residual=addresses["y"], **sizes, **options)


for sizes, dtype in itertools.product(
    [
        (2, 9, 17, 5, 7, 3, 1, 1, 1),
        (1, 20, 70, 2, 67, 3, 2, 1, 1),
        (1, 5, 0, 3, 67, 5, 1, 2, 1),
        (1, 8, 3, 6, 40, 5, 1, 18, 9),
        (1, 1, 1, 1, 1, 1, 1, 0, 1),
    ],
    DTYPES,
):
    pac_conv2d(*sizes, dtype)
    if dtype == "float32":
        pac_conv2d(*sizes, dtype, allow_tf32=True)


def pac_conv2d_backward(batch, channels, outputs, guides, height, width, stride, padding, normalize, shared, dtype):
    size, pixels = BYTES[dtype], height * width
    sizes = {"batch": batch, "channels": channels, "guide_channels": guides, "out_channels": outputs}
    sizes.update(height=height, width=width, kernel_size=3, stride=(stride, 1), padding=(padding, 1))
    sizes.update(dilation=(1, 2), normalize=normalize, shared=shared, dtype=extension.DTYPES[dtype])
    out_pixels = ((height + 2 * padding - 3) // stride + 1) * (width + 2 - 4)
    filters = 9 if shared else outputs * channels * 9
    arrays = {
        "grad_y": array(batch * outputs * out_pixels, size),
        **{name: array(batch * channels * pixels, size) for name in ("x", "grad_x")},
        **{name: array(batch * guides * pixels, size) for name in ("guide", "grad_guide")},
        **{name: array(filters, size) for name in ("weight", "grad_weight")},
        "grad_bias": array(outputs, size),
    }
    workspace = array(extension.pac_conv2d_backward_workspace_cuda(**sizes, wanted=(True, True, True, True)), 1)
    options = {**{name: values.ctypes.data for name, values in arrays.items()}, **sizes, "alpha": 1.0}
    options["output_dtype"] = sizes["dtype"]
    for allow_tf32 in (False, True) if dtype == "float32" else (False,):
        extension.pac_conv2d_backward_cuda(**options, workspace=workspace.ctypes.data, allow_tf32=allow_tf32, stream=0)
    if dtype != "float16":
        extension.pac_conv2d_backward_cpu(**options, threads=2)


for sizes, dtype, channels_last in itertools.product([(2, 17, 7, 9, 5), (1, 3, 3, 3, 1)], DTYPES, (False, True)):
    neighbor_difference(*sizes, dtype, channels_last)
for sizes, dtype in itertools.product([(2, 67, 37), (1, 1, 1), (2, 135, 40), (1, 130, 200)], DTYPES):
    info_nce(*sizes, dtype)
for shape, dtype in itertools.product([(2, 3, 37, 61), (1, 2, 33, 64), (1, 2, 300, 3), (2, 4, 1, 1)], DTYPES):
    dual_pool_attention(*shape, dtype)
for sizes, dtypes in itertools.product(
    [(2, 3, 37, 61, 3), (1, 18, 33, 64, 1), (2, 4, 1, 1, 0), (1, 16, 2, 130, 1)],
    [*((dtype, dtype) for dtype in DTYPES), ("float32", "float16"), ("float32", "bfloat16")],
):
    dual_pool_attention_pad2d(*sizes, *dtypes)
for sizes, dtype in itertools.product(
    [
        (2, 3, 5, 9, 7, 11, 1, 1, False, False),
        (1, 70, 18, 2, 5, 9, 2, 3, True, False),
        (1, 64, 65, 1, 3, 6, 1, 0, False, False),
        (2, 9, 9, 3, 6, 8, 2, 1, True, True),
    ],
    DTYPES,
):
    pac_conv2d_backward(*sizes, dtype)
for sizes, dtype in itertools.product([(2, 18, 5, 37, 61), (1, 32, 16, 3, 64), (3, 2, 1, 1, 1)], DTYPES):
    relu_split(*sizes, dtype)
for shape, radius, dtype in itertools.product(
    [(2, 3, 37, 61), (1, 2, 3, 3), (1, 1, 70, 2), (5, 1, 8, 9)], (1, 2, 3), ("float32", "float64")
):
    matting_laplacian(*shape, radius, dtype)

misaligned = True
for dtype in DTYPES:
    dual_pool_attention(1, 1, 5, 64, dtype)
    dual_pool_attention_pad2d(1, 16, 2, 16, 1, dtype, dtype)
    relu_split(1, 16, 8, 1, 64, dtype)
    info_nce(1, 17, 24, dtype)
    neighbor_difference(1, 8, 3, 16, 1, dtype, False)
    pac_conv2d(1, 4, 16, 2, 16, 3, 1, 1, 1, dtype)
    pac_conv2d_backward(1, 16, 17, 1, 3, 8, 1, 0, False, False, dtype)
