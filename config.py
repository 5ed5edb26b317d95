"""Read the YAML file that describes the data into a validated, frozen config."""

import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from base.errors import UserError


def _resolve_folder(value: Any, info: ValidationInfo) -> Path:
    """An existing folder: relative paths start at the current directory, then at the YAML file's."""
    if not isinstance(value, str) or not value:
        raise ValueError("expected the path of a folder")
    candidates = list(dict.fromkeys([Path(value), info.context["yaml_dir"] / value]))
    for folder in candidates:
        if folder.is_dir():
            return folder.resolve()
    looked = " nor ".join(str(folder.absolute()) for folder in candidates)
    raise ValueError(f"no such folder (looked for {looked})")


def _as_tuple(value: Any) -> Any:
    """A YAML list as a tuple; null is an empty one."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise ValueError("expected a list")
    return tuple(value)


def _without_empty_items(items: tuple) -> tuple:
    """Drop list items left empty in the YAML (`- # comment`), after validation has numbered them."""
    return tuple(item for item in items if item is not None)


Folder = Annotated[Path, BeforeValidator(_resolve_folder)]


class DatasetConfig(BaseModel):
    """One folder of photos with masks, and what is done to them."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    data_dir: Folder
    bg_paths: Annotated[
        tuple[Folder | None, ...],
        BeforeValidator(_as_tuple),
        AfterValidator(_without_empty_items),
    ] = ()
    w_aug: bool = False
    aug_details: Annotated[tuple[Literal["crop_foreground"], ...], BeforeValidator(_as_tuple)] | None = None
    percentage: float = Field(default=1.0, gt=0, allow_inf_nan=False)

    @property
    def composites(self) -> bool:
        """Whether cables are cut out and pasted on backgrounds, or photos used as they are."""
        return bool(self.bg_paths)

    @model_validator(mode="after")
    def _check_compositing(self) -> "DatasetConfig":
        if self.bg_paths and self.aug_details is not None and "crop_foreground" not in self.aug_details:
            raise ValueError(
                "bg_paths asks for composites but aug_details lacks crop_foreground; "
                "add it, or drop one of the two keys"
            )
        if self.aug_details and not self.bg_paths:
            warnings.warn(
                f"{self.data_dir}: aug_details has crop_foreground but bg_paths names no folder; "
                "photos are used as they are",
                stacklevel=2,
            )
        return self


class DataConfig(BaseModel):
    """The `dataset` section: datasets to train on, and the one to test on (or None)."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    train: Annotated[
        tuple[DatasetConfig | None, ...],
        BeforeValidator(_as_tuple),
        AfterValidator(_without_empty_items),
        Field(min_length=1),
    ]
    test: DatasetConfig | None = None


class Config(BaseModel):
    """The whole YAML file."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    dataset: DataConfig


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where PyYAML silently keeps the last one."""


def _construct_unique_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict:
    seen = set()
    for key_node, _ in node.value:
        key = key_node.value
        if isinstance(key, str) and key_node.tag != "tag:yaml.org,2002:merge":
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands here twice", key_node.start_mark
                )
            seen.add(key)
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor("tag:yaml.org,2002:map", _construct_unique_mapping)


MAX_BYTES = 1_000_000
MAX_VALUES = 100_000  # with every alias written out


def _count_values(node: yaml.Node, counts: dict[int, float]) -> float:
    """Values in a node with its aliases written out; infinite if it contains itself."""
    if id(node) not in counts:
        counts[id(node)] = float("inf")
        children = node.value if isinstance(node, yaml.CollectionNode) else ()
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        counts[id(node)] = 1 + sum(_count_values(child, counts) for child in children)
    return counts[id(node)]


def _read_yaml(path: Path) -> Any:
    """What a YAML file holds; raises ValueError if it is unreadable, not YAML, or too large to be meant."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} is larger than {MAX_BYTES} bytes; expected a short YAML file")
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=_UniqueKeyLoader)
        if node is not None and _count_values(node, {}) > MAX_VALUES:
            raise UserError(f"{path}: its aliases (*name) expand to more than {MAX_VALUES} values")
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    except (OSError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def load_config(path: str | Path) -> Config:
    """Read and validate a config file.

    Raises UserError if `path` is not a file, or if it cannot be read, is not
    YAML (with the line) or does not fit the schema (every fault at once, each with its key path,
    value and what was expected).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"config file not found: {path}")
    document = _read_yaml(path)
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected a mapping with the key 'dataset' at the top level")
    try:
        return Config.model_validate(document, context={"yaml_dir": path.resolve().parent})
    except ValidationError as error:
        lines = [f"  {_describe(fault)}" for fault in error.errors()]
        raise UserError("\n".join([f"{path}: {len(lines)} error(s)", *lines])) from error


def _describe(fault: dict) -> str:
    """One readable line for one pydantic error, e.g. `dataset.train[0].percentage: ... (got 0)`."""
    key_path = ""
    for part in fault["loc"]:
        key_path += f"[{part}]" if isinstance(part, int) else f".{part}"
    key_path = key_path.lstrip(".")
    if fault["type"] == "missing":
        return f"{key_path}: required key is missing"
    if fault["type"] == "extra_forbidden":
        return f"{key_path}: unknown key"
    if fault["type"] == "too_short":
        return f"{key_path}: needs at least one dataset"
    message = fault["msg"].removeprefix("Value error, ")
    value = repr(fault["input"])
    return f"{key_path}: {message} (got {value if len(value) <= 80 else value[:77] + '...'})"
