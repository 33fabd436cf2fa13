"""Hugging Face model directories: read and write config.json and safetensors."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxforget.errors import RunError, UserError
from jaxforget.files import leads, new_directory
from jaxforget.models import configs
from jaxforget.models.model import Model, Params, build, family_of
from jaxforget.models.sharding import from_parts, host, parameter_sharding, resting

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
DTYPES = ("float32", "bfloat16", "float16")
_STORED = {"F64", "F32", "F16", "BF16"}
_OLD_NAMES = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))  # BERT's first files


# ------------------------------------------------------------------------------------------------- reading
def load(
    name_or_dir: str | Path,
    *,
    dtype: str = "float32",
    head: str | None = None,
    labels: tuple[str, ...] = (),
    seed: int = 0,
    tell: Callable[[str], None] = lambda message: None,
) -> tuple[Model, Params]:
    """Read a model from a directory or by hub name. Parameters are float32 numpy arrays; with a mesh, each device's
    part is read from the file and put there.

    dtype: of activations. head: the head to use instead of the one in the file, "none" for none; a head that the file
    lacks is drawn from `seed`, and `tell` is told. labels: the classes needed; a stored classification head that has
    them all is kept, with its own order. Raises UserError, one sentence, for anything missing, malformed, unsupported
    or of the wrong shape.
    """
    directory = resolve(name_or_dir)
    raw = read_json(directory / CONFIG)
    try:
        configs.choose("quantization_config", raw.get("quantization_config"), [None])
        stored = config = family_of(raw.get("model_type")).Config.from_hf(raw)
        if head is not None:
            names = stored.labels if set(labels) <= set(stored.labels) else labels
            config = dataclasses.replace(stored, head=head, labels=names if head == "classification" else ())
    except UserError as error:
        raise UserError(f"{directory / CONFIG}: {error}") from None
    # Some families' config.json does not say everything; the names in the file do.
    settle = getattr(family_of(config.model_type), "settle", lambda config, names: config)
    with _Tensors(_weight_files(directory)) as tensors:
        model = build(settle(config, tensors), dtype=dtype)
        stored = settle(stored, tensors) if head else None
        return model, to_params(model, tensors, where=str(directory), stored=stored, seed=seed, tell=tell)


def resolve(name_or_dir: str | Path) -> Path:
    """Return the local directory of a model, fetching it from the hub unless it is a directory already."""
    directory = Path(name_or_dir).expanduser()
    if directory.is_dir():
        return directory
    name = str(name_or_dir)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) or directory.exists():
        raise UserError(f"model directory {name} does not exist or is not a directory")
    import huggingface_hub

    patterns = [CONFIG, WEIGHTS, INDEX, "model-*.safetensors", *TOKENIZER_FILES]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # offline, unknown, gated, interrupted: the library has an exception for each
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"model {name} is not a directory and could not be fetched from the hub: {reason}") from None


def to_params(
    model: Model,
    tensors: Mapping[str, np.ndarray],
    *,
    where: str = "tensors",
    stored: Any = None,
    seed: int = 0,
    tell: Callable[[str], None] = lambda message: None,
) -> Params:
    """Convert tensors under Hugging Face names to parameters. `tensors[name]` has a shape and is read by slices.

    stored: the config that the tensors were saved with, where the model may have another head; parameters of its head
    that are absent, or made for other labels, are drawn from `seed`. Without it they are errors like others.
    Raises UserError naming tensors that are missing, unexpected or of the wrong shape.
    """
    family = family_of(model.config.model_type)
    table = family.keys(model.config)
    names = set(tensors)
    prefix = family.PREFIX if any(name.startswith(family.PREFIX) for name in names) else ""

    def theirs(table):
        """Ours to theirs: one name, or one a layer."""
        return {
            path: [
                _rename(name, family.PREFIX, prefix).format(i)
                for i in (range(model.config.stacks[path.split("/")[0]]) if "{}" in name else [0])
            ]
            for name, (path, _) in table.items()
        }

    wanted, shapes = theirs(table), model.shapes()
    fresh = []
    if stored is not None:
        backbone = family.keys(dataclasses.replace(model.config, head="none", labels=()))
        for name, (path, transposed) in table.items():
            shape = get_leaf(shapes, path).shape
            if name not in backbone and not (
                wanted[path][0] in names and tensors[wanted[path][0]].shape == (shape[::-1] if transposed else shape)
            ):
                fresh.append(path)
    expected = {name for path, group in wanted.items() if path not in fresh for name in group}
    known = {name for group in wanted.values() for name in group}
    known |= {name for group in theirs(family.keys(stored or model.config)).values() for name in group}
    ignored = [f"({re.escape(prefix)})?{pattern}" for pattern in family.IGNORED]  # heads have no prefix
    ignored += [r"lm_head\.weight"] * model.config.tie_word_embeddings
    unexpected = [name for name in names - known if not any(re.fullmatch(p, name) for p in ignored)]
    for kind, found in (("missing", expected - names), ("unexpected", unexpected)):
        if found:
            raise UserError(f"{where}: {len(found)} {kind} tensors, such as {', '.join(sorted(found)[:3])}")
    params: Params = {}
    for path, transposed in table.values():
        if path in fresh:
            continue
        shape = get_leaf(shapes, path).shape
        stacked = path.split("/")[0] in model.config.stacks
        one = shape[1:] if stacked else shape
        for name in wanted[path]:
            if tuple(tensors[name].shape) != (one[::-1] if transposed else one):
                raise UserError(
                    f"{where}: tensor {name} of parameter {path} has shape {tuple(tensors[name].shape)}; "
                    f"the config expects {one[::-1] if transposed else one}"
                )

        def read(index, shape=shape, stacked=stacked, transposed=transposed, names=wanted[path]):
            """Fill the part of the parameter at these slices, tensor by tensor."""
            part = np.empty([len(range(length)[cut]) for cut, length in zip(index, shape, strict=True)], np.float32)
            inner = index[1:] if stacked else index
            for i, name in enumerate(names[index[0]] if stacked else names):
                target = part[i] if stacked else part
                target[...] = tensors[name][inner[::-1]].T if transposed else tensors[name][inner]
            return part

        where_to = parameter_sharding(path, shape)
        whole = (slice(None),) * len(shape)
        set_leaf(params, path, read(whole) if where_to is None else from_parts(shape, where_to, read))
    if fresh:
        tell(f"{where}: the {model.config.head} head is new; drawn at random: {', '.join(fresh)}")
        drawn = jax.jit(lambda key: {path: get_leaf(model.init(key), path) for path in fresh})(jax.random.key(seed))
        for path, leaf in drawn.items():
            set_leaf(params, path, resting({path: leaf})[path])
    return params


class _Tensors(Mapping):
    """The tensors of several safetensors files, read when asked for. A class, to close the files."""

    def __init__(self, files: list[Path]):
        from safetensors import SafetensorError, safe_open

        self._handles: list[Any] = []
        self._where: dict[str, tuple[Any, Path, str]] = {}
        for file in files:
            try:
                handle = safe_open(file, framework="np").__enter__()
                self._handles.append(handle)
                self._where |= {_today(name): (handle, file, name) for name in handle.keys()}  # noqa: SIM118  not a dict
            except (SafetensorError, OSError) as error:
                self.__exit__()
                raise UserError(f"{file} is truncated or not a safetensors file: {error}") from None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self._handles:
            handle.__exit__(None, None, None)

    def __len__(self):
        return len(self._where)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __getitem__(self, name: str) -> _Stored:
        handle, file, name = self._where[name]
        stored = handle.get_slice(name)
        if stored.get_dtype() not in _STORED:
            raise UserError(f"{file}: tensor {name} is stored as {stored.get_dtype()}; supported: "
                            f"{', '.join(sorted(_STORED))}")  # fmt: skip
        return _Stored(stored, tuple(stored.get_shape()), f"{file} is truncated or damaged at tensor {name}")


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A tensor in a file; a slice of it is what is read."""

    stored: Any
    shape: tuple[int, ...]
    damaged: str

    def __getitem__(self, index):
        from safetensors import SafetensorError

        try:
            return self.stored[index]
        except SafetensorError as error:
            raise UserError(f"{self.damaged}: {error}") from None


def _weight_files(directory: Path) -> list[Path]:
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if (directory / INDEX).is_file():
        weight_map = read_json(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{directory / INDEX} has no weight_map")
        files = sorted({directory / str(name) for name in weight_map.values()})
        for file in files:
            if not file.is_file():
                raise UserError(f"{file} is missing; {INDEX} names it")
        return files
    if any(directory.glob("pytorch_model*.bin")):
        raise UserError(f"{directory} has only pytorch_model.bin; save it with safe_serialization as {WEIGHTS}")
    raise UserError(f"{directory} has neither {WEIGHTS} nor {INDEX}")


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold a JSON object, not a {type(content).__name__}")
    return content


# ------------------------------------------------------------------------------------------------- writing
def save(
    directory: str | Path,
    model: Model,
    params: Params,
    *,
    tokenizer_dir: str | Path | None = None,
    dtype: str = "float32",
    max_shard_bytes: float = 5e9,
    extra_files: Mapping[str, str | bytes] | None = None,
) -> Path:
    """Write a directory that `transformers` loads. It appears complete or not at all.

    tokenizer_dir: copy the tokenizer files found there. dtype: of the stored weights. max_shard_bytes: start
    another file beyond this size. extra_files: more files, name -> content. Raises UserError where
    `directory` exists and is not empty, or dtype is not float32, bfloat16 or float16; OSError or RunError naming
    `directory` where it cannot be written.
    """
    from safetensors import SafetensorError

    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; supported: {', '.join(DTYPES)}")
    try:
        with new_directory(directory) as temporary:
            _write_files(temporary, model, params, dtype, max_shard_bytes)
            for file in () if tokenizer_dir is None else (Path(tokenizer_dir) / name for name in TOKENIZER_FILES):
                if file.is_file():
                    shutil.copyfile(file, temporary / file.name)
            for name, content in (extra_files or {}).items():
                (temporary / name).write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        error.filename = str(directory)  # a failed write does not say of what
        raise
    except SafetensorError as error:  # for its files, instead of OSError
        raise RunError(f"{directory} cannot be written ({error}); make room and use --resume") from error
    return Path(directory).expanduser()


def to_tensors(model: Model, params: Params) -> dict[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]]:
    """Return Hugging Face name -> (shape, function that makes the float32 array)."""
    table = family_of(model.config.model_type).keys(model.config)
    found = {}
    for name, (path, transposed) in table.items():
        leaf = get_leaf(params, path)
        for i in range(model.config.stacks[path.split("/")[0]]) if "{}" in name else [None]:
            shape = leaf.shape if i is None else leaf.shape[1:]
            found[name.format(i)] = (shape[::-1] if transposed else shape, _reader(leaf, i, transposed))
    return found


def _reader(leaf: Any, i: int | None, transposed: bool) -> Callable[[], np.ndarray]:
    def read():
        array = np.asarray(host(leaf if i is None else leaf[i]), np.float32)
        return array.T if transposed else array

    return read


def _write_files(directory: Path, model: Model, params: Params, dtype: str, max_shard_bytes: float) -> None:
    from safetensors.numpy import save_file

    # Two spellings of one key: transformers 4 reads torch_dtype, transformers 5 dtype.
    config = model.config.to_hf() | {"torch_dtype": dtype, "dtype": dtype}
    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    stored = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    tensors = to_tensors(model, params)
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, (shape, _) in tensors.items():
        n = int(np.prod(shape)) * stored.itemsize
        if shards[-1] and size + n > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + n, total + n
    index: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = WEIGHTS if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        # safetensors writes an array's memory as it lies: a transposed view has to be copied.
        arrays = {name: np.ascontiguousarray(tensors[name][1]().astype(stored)) for name in names}
        if leads():
            save_file(arrays, directory / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    if len(shards) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (directory / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------------------- names
def _rename(name: str, old: str, new: str) -> str:
    return new + name[len(old) :] if name.startswith(old) else name


def _today(name: str) -> str:
    for old, new in _OLD_NAMES:
        name = name.replace(old, new)
    return name


def get_leaf(tree: Any, path: str) -> Any:
    for part in path.split("/"):
        tree = tree[part]
    return tree


def set_leaf(tree: Any, path: str, leaf: Any) -> None:
    *parts, last = path.split("/")
    for part in parts:
        tree = tree.setdefault(part, {})
    tree[last] = leaf
