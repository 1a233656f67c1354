"""Files of weights: safetensors with a JSON description, written atomically, never pickled."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

import restoration
from restoration.errors import UserError
from restoration.files import write_whole
from restoration.flow import NETWORK_PRECISIONS, Architecture, ReversibleNetwork

FORMAT = "painting-restoration 1"
NETWORK_PREFIX = "network."
_WEIGHTS_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHIPPED_WEIGHTS = Path(__file__).parent / "weights" / "restoration.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name ('network.…', and in training 'losses.…' and 'optimizer.…') and what was said of them."""

    tensors: dict[str, Tensor]
    description: dict[str, object]

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix) :]: tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}


def save_checkpoint(path: Path, tensors: dict[str, Tensor], description: dict[str, object]) -> None:
    """Writes path as `files.write_whole` does."""
    versions = {"restoration": restoration.__version__, "torch": torch.__version__}
    metadata = {"format": FORMAT, "description": json.dumps({**description, "versions": versions}, sort_keys=True)}
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata["sha256"] = _checksum(contiguous, metadata["description"])
    # Not safetensors' save_file: its own temporary file outlives a killed process under a secret name.
    write_whole(path, safetensors.torch.save(contiguous, metadata))


def _checksum(tensors: dict[str, Tensor], description: str) -> str:
    checksum = hashlib.sha256(description.encode())
    for name, tensor in sorted(tensors.items()):
        checksum.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        checksum.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return checksum.hexdigest()


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a file of save_checkpoint. UserError for anything else, and where a bit of it has changed.

    A pickled file is refused, not opened.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder, must be a checkpoint")
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator of its own)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(
            f"{path}: not a readable safetensors file: truncated, damaged or of another kind (pickled checkpoints are "
            "never loaded)"
        ) from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint of this program (format {metadata.get('format')!r})")
    # Files of the first versions have none.
    if "sha256" in metadata and metadata["sha256"] != _checksum(tensors, metadata.get("description", "")):
        raise UserError(f"{path}: is damaged: its contents are not those that were written")
    try:
        description = json.loads(metadata["description"])
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: its description cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(description, dict):
        raise UserError(f"{path}: its description must be a JSON object, got {type(description).__name__}")
    return Checkpoint(tensors, description)


def save_network(path: Path, network: ReversibleNetwork, description: dict[str, object]) -> None:
    """The network alone, in float16: half the size, and exact again in float32 on both sides of the transfer."""
    tensors = {NETWORK_PREFIX + name: tensor.half() for name, tensor in network.state_dict().items()}
    save_checkpoint(path, tensors, {**description, "architecture": network.architecture.to_dict()})


def load_network(path: str | Path | None = None, precision: str = "fp32") -> ReversibleNetwork:
    """The network of a training checkpoint or of shipped weights (path None), in float32, ready to use on the CPU.

    precision: that of its residual functions, fp32 or bf16.
    """
    if precision not in NETWORK_PRECISIONS:
        raise UserError(f"--precision must be one of {', '.join(NETWORK_PRECISIONS)}, got {precision!r}")
    path = Path(path) if path is not None else SHIPPED_WEIGHTS
    checkpoint = load_checkpoint(path)
    try:
        architecture = Architecture(**checkpoint.description["architecture"])
        network = ReversibleNetwork(architecture, precision)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: holds a network of another architecture ({reason})") from error
    load_parameters(network, checkpoint.part(NETWORK_PREFIX), path)
    return network.eval()


def load_parameters(module: torch.nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Fills module's parameters; UserError names the first that is missing, unknown, of another shape or not finite."""
    expected = module.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        wanted = tuple(expected[name].shape) if name in expected else None
        found = tuple(tensors[name].shape) if name in tensors else None
        if wanted != found:
            raise UserError(
                f"{path}: holds a network of another architecture ({name} must be {wanted or 'absent'}, "
                f"got {found or 'nothing'})"
            )
        if tensors[name].dtype not in _WEIGHTS_DTYPES:
            raise UserError(
                f"{path}: holds weights of {tensors[name].dtype} ({name}), which this program does not read"
            )
        if not tensors[name].isfinite().all():
            raise UserError(f"{path}: holds weights that are not finite ({name})")
    module.load_state_dict({name: tensor.to(expected[name].dtype) for name, tensor in tensors.items()})
