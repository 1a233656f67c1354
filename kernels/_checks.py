"""Every input check and its wording: ``operator: argument must ..., got ...``, before any work starts.

One function for each operator, made of the questions of _require.py.
"""

import math

import torch
from torch._subclasses.fake_tensor import FakeTensor

from . import _require as require

_MODES = torch._C._TorchDispatchModeKey
_MODES_WITHOUT_NUMBERS = (_MODES.FAKE, _MODES.PROXY, _MODES.FUNCTIONAL)
# Bins along a side of the image: kernels visit those over a pixel one by one, and count them times a side in 64 bits.
_MOST_BINS = 2**20
# Places are drawn as the rest of 62 random bits: so few that none is favoured by more than one part in 2^22.
_MOST_PLACES = 2**40
# Kernels multiply by their inverses, which must be finite: that of eps in float64, of a temperature in float32.
_LEAST_EPS, _LEAST_TEMPERATURE = 1e-300, 1e-30
# Steps of a convolution, of which no sum then leaves 64 bits.
_LARGEST_STEP = 2**30
# float32's powers of two: multiples of others cannot be computed in it.
_LEAST_QUANTUM, _LARGEST_QUANTUM = 2.0**-126, 2.0**127


def backend(operator, name, source, names):
    """Checks the name of a backend; source says where the wish came from."""
    if name not in names:
        require.fail(operator, "backend", f"be one of {', '.join(names)}", f"{name!r} from {source}")


def able(operator, name, source, reasons):
    """Checks that the backend wished for can run a call, given why each backend cannot (None for those that can)."""
    if reasons[name] is not None:
        others = ", ".join(other for other, reason in reasons.items() if reason is None)
        must = f"be able to run this call ({others} can; without a wish the fastest of them does)"
        require.fail(operator, "backend", must, f"{name!r} from {source}: {reasons[name]}", RuntimeError)


def usable(operator, name, device, reason):
    """Checks that a backend already chosen can run here on tensors of the device, given why it cannot or None."""
    if reason is not None:
        require.fail(operator, "backend", f"be able to run here on {device.type}", f"{name!r}: {reason}", RuntimeError)


def pac_conv2d(operator, x, guide, weight, bias, stride, padding, dilation, normalize, residual, alpha, quantum):
    """Checks a pixel-adaptive convolution; returns stride, padding and dilation as (vertical, horizontal) pairs."""
    B, C, H, W = require.tensor(operator, "x", x, ("B", "C", "H", "W"))
    require.tensor(operator, "guide", guide, (B, "G", H, W), like=("x", x))
    O, channels, K, width = require.tensor(operator, "weight", weight, ("O", "C", "K", "K"), like=("x", x))
    if (O, channels) == (1, 1):
        O = C
    elif channels != C:
        require.fail(operator, "weight", f"be of shape [O, {C}, K, K] or [1, 1, K, K]", require.shape_of(weight))
    if width != K or K % 2 == 0:
        require.fail(operator, "weight", "have a square kernel of odd size", f"{K} x {width}")
    if bias is not None:
        require.tensor(operator, "bias", bias, (O,), like=("x", x))
    require.boolean(operator, "normalize", normalize)
    geometry = _geometry(operator, stride, padding, dilation)
    size = _checked_output_size(operator, "x", x, K, *geometry)
    if residual is not None:
        require.tensor(operator, "residual", residual, (B, O, *size), device_of=("x", x))
        # A convolution of half precision may be added to a stream of float32.
        dtypes = dict.fromkeys((x.dtype, torch.promote_types(x.dtype, torch.float32)))
        if residual.dtype not in dtypes:
            must = f"have dtype {' or '.join(map(str, dtypes))}, where x has {x.dtype}"
            require.fail(operator, "residual", must, residual.dtype)
    require.number(operator, "alpha", alpha)
    if quantum is not None:
        require.number(operator, "quantum", quantum, positive=True)
        power = _LEAST_QUANTUM <= quantum <= _LARGEST_QUANTUM and math.frexp(quantum)[0] == 0.5
        # An integer beyond 2^53 is rounded by frexp.
        if not power or float(quantum) != quantum:
            require.fail(operator, "quantum", "be a power of two from 2^-126 to 2^127", quantum)
    return geometry


def pac_conv2d_(residual, x, guide, weight, bias, stride, padding, dilation, normalize, alpha, quantum):
    """Checks as :func:`pac_conv2d`, and that writing into residual harms nothing."""
    operator = "pac_conv2d_"
    require.tensor(operator, "residual", residual, ("B", "O", "H'", "W'"))
    geometry = pac_conv2d(
        operator, x, guide, weight, bias, stride, padding, dilation, normalize, residual, alpha, quantum
    )
    if not residual.is_contiguous():
        require.fail(
            operator, "residual", "be contiguous", f"strides {list(residual.stride())} for {require.shape_of(residual)}"
        )
    if torch.is_grad_enabled():
        for argument, value in dict(residual=residual, x=x, guide=guide, weight=weight, bias=bias).items():
            if value is not None and value.requires_grad:
                require.fail(
                    operator, argument, "require no gradient (use pac_conv2d, or torch.no_grad())", "one that does"
                )
    if torch.compiler.is_compiling():  # which knows neither what follows nor addresses; the op looks at these
        return geometry
    if residual.is_inference() and not torch.is_inference_mode_enabled():
        require.fail(
            operator, "residual", "be written to inside torch.inference_mode() alone", "one that was made there"
        )
    if residual.is_neg():
        require.fail(
            operator, "residual", "be without the negative bit (torch.Tensor.resolve_neg copies it)", "a view with it"
        )
    apart(operator, ("residual", residual), dict(x=x, guide=guide, weight=weight, bias=bias))
    return geometry


def apart(operator, written, others):
    """Checks that a tensor to be written to shares no memory with others: it is given with its name, they by theirs."""
    name, output = written
    if not (_are_calls_run() and _has_addresses(output)):
        return
    first, end = _addresses(output)
    for argument, value in others.items():
        if value is None or not _has_addresses(value):
            continue
        # Cautious for interleaved views, which are rare.
        other_first, other_end = _addresses(value)
        if first < other_end and other_first < end:
            require.fail(operator, argument, f"share no memory with {name}, which is written to", "overlapping tensors")


def pac_kernel2d(guide, kernel_size, stride, padding, dilation, normalize):
    """Checks a kernel to look at; returns stride, padding and dilation as pairs."""
    operator = "pac_kernel2d"
    require.tensor(operator, "guide", guide, ("B", "G", "H", "W"))
    _kernel_size(operator, kernel_size)
    require.boolean(operator, "normalize", normalize)
    geometry = _geometry(operator, stride, padding, dilation)
    _checked_output_size(operator, "guide", guide, kernel_size, *geometry)
    return geometry


def pac_conv2d_module(
    in_channels, out_channels, kernel_size, stride, padding, dilation, bias, normalize, shared_filters, device, dtype
):
    """Checks the arguments of PacConv2d."""
    operator = "PacConv2d"
    require.integer(operator, "in_channels", in_channels, 1)
    require.integer(operator, "out_channels", out_channels, 1)
    _kernel_size(operator, kernel_size)
    _geometry(operator, stride, padding, dilation)
    for argument, value in dict(bias=bias, normalize_kernel=normalize, shared_filters=shared_filters).items():
        require.boolean(operator, argument, value)
    if shared_filters and in_channels != out_channels:
        require.fail(operator, "out_channels", f"equal in_channels = {in_channels} with shared_filters", out_channels)
    _device_or_none(operator, device)
    _dtype_or_none(operator, dtype)


def sample_neighbors(height, width, num_anchors, generator, device):
    """Checks a draw of anchors."""
    operator = "sample_neighbors"
    require.integer(operator, "height", height, 3)
    require.integer(operator, "width", width, 3)
    if height * width > _MOST_PLACES:
        require.fail(operator, "height and width", "have at most 2^40 places", f"{height} x {width}")
    _anchors(operator, "num_anchors", num_anchors, height, width)
    _generator(operator, generator)
    _device_or_none(operator, device)


def neighbor_difference(features, anchors, neighbors):
    """Checks features and the places in them."""
    operator = "neighbor_difference"
    _, _, H, W = require.tensor(operator, "features", features, ("B", "C", "H", "W"))
    (N,) = require.tensor(operator, "anchors", anchors, ("N",), device_of=("features", features), dtypes=(torch.int64,))
    require.tensor(operator, "neighbors", neighbors, (N, 8), device_of=("features", features), dtypes=(torch.int64,))
    is_run = not torch.compiler.is_compiling() and _are_calls_run()
    if not (is_run and _has_addresses(anchors) and _has_addresses(neighbors)):
        return
    for argument, places in (("anchors", anchors), ("neighbors", neighbors)):
        first, last = places.min().item(), places.max().item()
        if first < 0 or last >= H * W:
            require.fail(operator, argument, f"lie in 0 to {H * W - 1}, the places of {H} x {W}", f"{first} to {last}")
    rows, columns = anchors // W, anchors % W
    border = (rows == 0) | (rows == H - 1) | (columns == 0) | (columns == W - 1)
    if border.any():
        require.fail(
            operator, "anchors", f"lie off the border of {H} x {W}, to have eight neighbours", anchors[border][0].item()
        )


def info_nce(query, key, temperature):
    """Checks the rows of a contrastive loss."""
    operator = "info_nce"
    shape = require.tensor(operator, "query", query, ("B", "S", "D"))
    require.tensor(operator, "key", key, shape, like=("query", query))
    _not_below(operator, "temperature", temperature, _LEAST_TEMPERATURE)


def ccpl_loss(features, targets, num_anchors, temperature, projections, generator):
    """Checks the layers of the loss; returns the number of anchors and the projection of each."""
    operator = "ccpl_loss"
    require.sequence(operator, "features", features)
    require.sequence(operator, "targets", targets, len(features))
    first = ("features[0]", features[0])
    for layer, (feature, target) in enumerate(zip(features, targets, strict=True)):
        shape = require.tensor(operator, f"features[{layer}]", feature, ("B", "C", "H", "W"), device_of=first)
        require.tensor(operator, f"targets[{layer}]", target, shape, like=(f"features[{layer}]", feature))
    _not_below(operator, "temperature", temperature, _LEAST_TEMPERATURE)
    each = isinstance(num_anchors, (tuple, list))
    if not each:
        num_anchors = [num_anchors] * len(features)
    if projections is None:
        projections = [None] * len(features)
    require.sequence(operator, "num_anchors", num_anchors, len(features))
    require.sequence(operator, "projections", projections, len(features))
    for layer, projection in enumerate(projections):
        if projection is not None and not callable(projection):
            require.fail(
                operator, f"projections[{layer}]", "be a module or None", require.kind_of(projection), TypeError
            )
    for layer, (feature, count) in enumerate(zip(features, num_anchors, strict=True)):
        H, W = feature.shape[2:]
        if H < 3 or W < 3:
            require.fail(operator, f"features[{layer}]", "be at least 3 x 3", f"{H} x {W}")
        _anchors(operator, f"num_anchors[{layer}]" if each else "num_anchors", count, H, W)
    _generator(operator, generator)
    return num_anchors, projections


def ccpl_projection(layer, rows, projected):
    """Checks what the projection of a layer made of rows [B, S, C]."""
    error = ValueError
    if not isinstance(projected, torch.Tensor) or not require.is_dense(projected):
        got, error = require.kind_of(projected), TypeError
    elif projected.dtype not in require.DTYPES:
        got = projected.dtype
    elif projected.ndim != 3 or projected.shape[:2] != rows.shape[:2] or projected.shape[2] == 0:
        got = require.shape_of(projected)
    else:
        return
    must = f"return a floating-point tensor of shape {require.named((*rows.shape[:2], 'D'))}"
    require.fail("ccpl_loss", f"projections[{layer}]", must, got, error)


def ccpl_loss_module(channels, num_anchors, temperature, project, device, dtype):
    """Checks the arguments of CCPLoss."""
    operator = "CCPLoss"
    require.boolean(operator, "project", project)
    require.sequence(operator, "channels", channels)
    for layer, count in enumerate(channels):
        require.integer(operator, f"channels[{layer}]", count, 1)
    each = isinstance(num_anchors, (tuple, list))
    if each:
        require.sequence(operator, "num_anchors", num_anchors, len(channels) if project else None)
    for layer, count in enumerate(num_anchors if each else [num_anchors]):
        require.integer(operator, f"num_anchors[{layer}]" if each else "num_anchors", count, 1)
    _not_below(operator, "temperature", temperature, _LEAST_TEMPERATURE)
    _device_or_none(operator, device)
    _dtype_or_none(operator, dtype)


def ccpl_loss_module_call(features, channels):
    """Checks that features are those that the heads of CCPLoss were made for."""
    operator = "CCPLoss"
    require.sequence(operator, "features", features, len(channels))
    for layer, (maps, count) in enumerate(zip(features, channels, strict=True)):
        require.tensor(operator, f"features[{layer}]", maps, ("B", count, "H", "W"))


def matting_laplacian(operator, image, guide, eps, radius):
    """Checks an image and the guide whose colours explain it."""
    B, _, H, W = require.tensor(operator, "image", image, ("B", "C", "H", "W"))
    require.tensor(operator, "guide", guide, (B, 3, H, W), like=("image", image))
    _window(operator, eps, radius)


def matting_laplacian_matrix(guide, eps, radius):
    """Checks the one guide of a sparse matrix."""
    operator = "matting_laplacian_matrix"
    require.tensor(operator, "guide", guide, (3, "H", "W"))
    _window(operator, eps, radius)


def dual_pool_attention(x, weight, pool_size, operator="dual_pool_attention"):
    """Checks feature maps and the filter over their channels."""
    require.tensor(operator, "x", x, ("B", "C", "H", "W"))
    (k,) = require.tensor(operator, "weight", weight, ("k",), like=("x", x))
    if k % 2 == 0:
        require.fail(operator, "weight", "have an odd number of entries", k)
    require.integer(operator, "pool_size", pool_size, 1, _MOST_BINS)


def dual_pool_attention_pad2d(x, weight, padding, pool_size, dtype, grad_addend):
    """Checks as :func:`dual_pool_attention`, that there is something to reflect, and what the gradient starts from."""
    operator = "dual_pool_attention_pad2d"
    dual_pool_attention(x, weight, pool_size, operator)
    require.integer(operator, "padding", padding, 0)
    if padding >= min(x.shape[2:]):
        require.fail(operator, "padding", f"be less than both sides of x, {list(x.shape[2:])}", padding)
    _dtype_or_none(operator, dtype)
    if grad_addend is not None:
        require.tensor(operator, "grad_addend", grad_addend, tuple(x.shape), like=("x", x))
        if grad_addend.requires_grad:
            require.fail(operator, "grad_addend", "be without gradients", "one that requires them")


def relu_split(x, channels):
    """Checks feature maps and where they are split."""
    operator = "relu_split"
    _, C, _, _ = require.tensor(operator, "x", x, ("B", "C", "H", "W"))
    if C < 2:
        require.fail(operator, "x", "have at least 2 channels", C)
    require.integer(operator, "channels", channels, 1, C - 1)


def _device_or_none(operator, device):
    try:
        torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError):
        require.fail(operator, "device", "be a torch.device, the name of one, or None", repr(device))


def _dtype_or_none(operator, dtype):
    if dtype is not None and dtype not in require.DTYPES:
        require.fail(operator, "dtype", f"be None or one of {', '.join(map(str, require.DTYPES))}", dtype)


def _geometry(operator, stride, padding, dilation):
    return (
        _pair(operator, "stride", stride, 1),
        _pair(operator, "padding", padding, 0),
        _pair(operator, "dilation", dilation, 1),
    )


def _pair(operator, argument, value, least):
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    # In full: all() of an expression takes twice as long.
    if len(pair) != 2 or not (require.is_integer(pair[0], least) and require.is_integer(pair[1], least)):
        require.fail(operator, argument, f"be an integer of at least {least} or a pair of them", repr(value))
    if max(pair) > _LARGEST_STEP:
        require.fail(operator, argument, "be at most 2^30", repr(value))
    return pair


def _kernel_size(operator, kernel_size):
    if not require.is_integer(kernel_size, 1) or kernel_size % 2 == 0:
        require.fail(operator, "kernel_size", "be an odd integer of at least 1", repr(kernel_size))


def output_size(image, kernel_size, stride, padding, dilation):
    """Rows and columns of a convolution's output; below 1 where there is none."""
    return tuple(
        (side + 2 * margin - gap * (kernel_size - 1) - 1) // step + 1
        for side, step, margin, gap in zip(image.shape[2:], stride, padding, dilation, strict=True)
    )


def _checked_output_size(operator, argument, image, kernel_size, stride, padding, dilation):
    size = output_size(image, kernel_size, stride, padding, dilation)
    if min(size) < 1:
        H, W = image.shape[2:]
        reach = [dilation[axis] * (kernel_size - 1) + 1 - 2 * padding[axis] for axis in (0, 1)]
        require.fail(operator, argument, f"be at least {reach[0]} x {reach[1]} to give an output", f"{H} x {W}")
    return size


def _anchors(operator, argument, count, height, width):
    require.integer(operator, argument, count, 1)
    places = (height - 2) * (width - 2)
    if count > places:
        require.fail(operator, argument, f"be at most the {places} interior places of {height} x {width}", count)


def _generator(operator, generator):
    if generator is not None and not isinstance(generator, torch.Generator):
        require.fail(operator, "generator", "be a torch.Generator or None", require.kind_of(generator), TypeError)


def _window(operator, eps, radius):
    _not_below(operator, "eps", eps, _LEAST_EPS)
    require.integer(operator, "radius", radius, 1, 3)


def _not_below(operator, argument, value, least):
    require.number(operator, argument, value, positive=True)
    if value < least:
        require.fail(operator, argument, f"be at least {least}", value)


def _are_calls_run():
    """Whether torch computes what is called, and does not only write it down or follow its shapes."""
    return all(torch._C._get_dispatch_mode(mode) is None for mode in _MODES_WITHOUT_NUMBERS)


def _has_addresses(tensor):
    """Whether its numbers can be looked at; an empty tensor has none."""
    if isinstance(tensor, FakeTensor):
        return False
    try:
        return tensor.numel() > 0 and tensor.data_ptr() != 0
    except RuntimeError:  # inside of a transform of torch.func
        return False


def _addresses(tensor):
    """Where the numbers of a tensor start, and where they end."""
    first = tensor.data_ptr()
    if tensor.is_contiguous():
        return first, first + tensor.nbytes
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (reach + 1) * tensor.element_size()
