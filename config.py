"""Read the YAML file that describes the data into a validated, frozen config."""

import codecs
import difflib
import os
import reprlib
import warnings
from collections.abc import Mapping
from datetime import date
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
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from base.errors import UserError
from base.flag_types import expand

# --- Schema -----------------------------------------------------------------------------------

# For paths of Windows, which its file manager copies with double quotes.
BACKSLASH_HINT = '; in double quotes, \\ begins a code of YAML: write / instead, as in "C:/photos"'


def _resolve_folder(value: Any, info: ValidationInfo) -> Path:
    """Return an existing folder.

    A relative path starts at the current directory. If there is no such folder, it starts at the YAML file.
    If there is no such folder either, `~` and variables such as `$HOME` are expanded.
    """
    if isinstance(value, date | int | float):
        raise ValueError("expected the path of a folder; write a name such as '2024-05-01' with quotes")
    if not isinstance(value, str) or not value:
        raise ValueError("expected the path of a folder")
    assert info.context is not None  # `load_config` gives it
    roots = (Path(), info.context["yaml_dir"])
    candidates = list(dict.fromkeys(root / text for text in (value, expand(value)) for root in roots))
    for folder in candidates:
        if os.path.isdir(folder):  # Path.is_dir raises OSError for a name that is too long
            if not os.access(folder, os.R_OK | os.X_OK):
                raise ValueError("the folder may not be read; change its permissions")
            return folder.resolve()
    tried = " and ".join(dict.fromkeys(str(folder.absolute()) for folder in candidates))
    hint = BACKSLASH_HINT if not value.isprintable() else ""  # YAML reads "\n" in "C:\new" as a line break
    raise ValueError(f"no such folder (tried {tried}){hint}")


def _require_dataset(folder: Path) -> Path:
    """Refuse the imgs/ or masks/ of a dataset in place of the dataset."""
    parts = [folder.parent / name for name in ("imgs", "masks")]
    if folder in parts and not os.path.isdir(folder / "imgs") and all(map(os.path.isdir, parts)):
        raise ValueError(f"expected the folder that holds imgs/ and masks/: write {folder.parent}")
    return folder


def _as_tuple(value: Any) -> tuple[Any, ...]:
    """Return a YAML list as a tuple, and null as an empty tuple."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise ValueError("expected a list" + ": begin its items with a dash" * isinstance(value, dict))
    return tuple(value)


def _accept_empty(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """Accept a list item that is empty in the YAML (`- # comment`)."""
    return None if value is None else validate(value)


def _drop_empty(items: tuple[Any, ...]) -> tuple[Any, ...]:
    """Drop the empty items; this runs last, so that errors count items as the YAML file does."""
    return tuple(item for item in items if item is not None)


def _as_number(value: Any) -> Any:
    """Return the number that a string means. YAML 1.1 reads `5e-1` and `50%` as strings."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise ValueError("expected a number such as 0.5, which means half of the pairs per epoch") from None


def _as_mask_values(value: Any) -> Any:
    """Return a list of gray values and colors as a tuple, and `nonzero` or null as they are."""
    if value is None or value == "nonzero":
        return value
    items = [tuple(item) if isinstance(item, list) else item for item in _as_tuple(value)]
    for item in items:
        is_value = isinstance(item, int) and not isinstance(item, bool) and 0 <= item <= 65535
        is_color = isinstance(item, tuple) and len(item) == 3 and all(_is_byte(part) for part in item)
        if not is_value and not is_color:
            raise ValueError(
                "expected `nonzero`, or a list of gray values or palette indices from 0 to 65535, "
                "e.g. [1, 2], or of colors, e.g. [[255, 0, 0]]"
            )
    if not items:
        raise ValueError("expected at least one value")
    return tuple(items)


def _is_byte(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255


def _refuse_list(value: Any) -> Any:
    """Refuse a list where one dataset is expected."""
    if isinstance(value, list):
        raise ValueError(
            "expected a mapping, not a list: there is one test dataset; write its keys below `test:` "
            "without a dash"
        )
    return value


Folder = Annotated[Path, BeforeValidator(_resolve_folder)]
MaskValuesKey = Annotated[
    tuple[int | tuple[int, int, int], ...] | Literal["nonzero"] | None, BeforeValidator(_as_mask_values)
]
# An epoch is planned as a whole; a larger percentage, given by mistake, would fill the memory.
MAX_PASSES = 10_000
MANY_PASSES = 10.0  # a percentage above it is probably meant in percent


class DatasetConfig(BaseModel):
    """One folder of photos with masks, and how samples are made from them."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    data_dir: Annotated[Folder, AfterValidator(_require_dataset)]
    bg_paths: Annotated[
        tuple[Annotated[Folder, WrapValidator(_accept_empty)], ...],
        BeforeValidator(_as_tuple),
        AfterValidator(_drop_empty),
    ] = ()
    w_aug: bool = False
    aug_details: Annotated[tuple[Literal["crop_foreground"], ...], BeforeValidator(_as_tuple)] | None = None
    percentage: Annotated[float, BeforeValidator(_as_number)] = Field(
        default=1.0, gt=0, le=MAX_PASSES, allow_inf_nan=False
    )
    mask_values: MaskValuesKey = None
    allow_large_foreground: bool = False
    allow_empty_masks: bool = False

    @property
    def composites(self) -> bool:
        """Whether cables are cut out and pasted on backgrounds. Otherwise, photos are used as they are."""
        return bool(self.bg_paths)

    @model_validator(mode="after")
    def _check_compositing(self) -> "DatasetConfig":
        if self.bg_paths and self.aug_details is not None and "crop_foreground" not in self.aug_details:
            raise ValueError(
                "bg_paths asks for composites, but aug_details lacks crop_foreground; "
                "add it, or remove one of the two keys"
            )
        if self.aug_details and not self.bg_paths:
            warnings.warn(
                f"{self.data_dir}: aug_details contains crop_foreground, but bg_paths names no folder; "
                "photos are used as they are",
                stacklevel=2,
            )
        return self

    @model_validator(mode="after")
    def _warn_of_many_passes(self) -> "DatasetConfig":
        if self.percentage > MANY_PASSES:
            warnings.warn(
                f"{self.data_dir}: percentage {self.percentage:g} means {self.percentage:g} passes per "
                f"epoch; for {self.percentage:g} percent, write {self.percentage / 100:g}",
                stacklevel=2,
            )
        return self


class DataConfig(BaseModel):
    """The `dataset` section: the datasets to train on, and the dataset to test on or None."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    train: Annotated[
        tuple[Annotated[DatasetConfig, WrapValidator(_accept_empty)], ...],
        BeforeValidator(_as_tuple),
        AfterValidator(_drop_empty),
        Field(min_length=1),
    ]
    test: Annotated[DatasetConfig | None, BeforeValidator(_refuse_list)] = None


class Config(BaseModel):
    """The whole YAML file."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    dataset: DataConfig


# --- Reading ----------------------------------------------------------------------------------

UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
MAX_BYTES = 1_000_000  # a config has a few hundred bytes; a larger file is something else


class _UniqueKeyLoader(yaml.SafeLoader):
    """A SafeLoader that refuses a duplicate key. PyYAML itself keeps the last value without a warning."""


def _construct_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        key = key_node.value
        if isinstance(key, str) and key_node.tag != "tag:yaml.org,2002:merge":
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} occurs twice", key_node.start_mark
                )
            seen.add(key)
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def load_config(path: str | Path) -> Config:
    """Read and validate a config file.

    Raises UserError if there is no such file, if it cannot be read, if it is not YAML (with the line), or
    if it does not fit the schema. In the last case, the message lists every error with its key path, the
    value and what was expected.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise UserError(f"--config {path}: is a folder; expected a YAML file that describes the data")
    if not os.path.isfile(path):  # Path.is_file raises OSError for a name that is too long
        raise UserError(f"config file not found: {path}")
    document = _read_yaml(path)
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected a mapping with the key 'dataset' at the top level")
    try:
        return Config.model_validate(document, context={"yaml_dir": path.resolve().parent})
    except ValidationError as error:
        lines = [f"  {_describe(fault)}" for fault in error.errors()]
    raise UserError("\n".join([f"{path}: {len(lines)} error(s)", *lines]))


def _read_yaml(path: Path) -> Any:
    """Return the content of a YAML file; raises UserError if it is unreadable, too large or not YAML."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} is larger than {MAX_BYTES} bytes; expected a short YAML file")
        content = path.read_bytes()
        # Without a mark, every second byte of UTF-16 is 0 in Western text.
        if content.startswith(UTF_16_MARKS) or content.count(b"\0") > len(content) / 4:
            raise UserError(f"cannot read {path}: it is encoded in UTF-16; save it as UTF-8")
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}; expected a text file in UTF-8") from error
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except RecursionError as error:
        raise UserError(f"cannot read {path}: it is nested too deeply") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # an impossible date is a ValueError
        hint = BACKSLASH_HINT if "\\" in text else ""
        raise UserError(f"{path} is not valid YAML: {error}{hint}") from error


def _describe(fault: Mapping[str, Any]) -> str:
    """Describe one pydantic error in one line, e.g. `dataset.train[0].percentage: ... (got 0)`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"])
    key_path = "".join(parts).lstrip(".")
    if fault["type"] == "missing":
        return f"{key_path}: required key is missing"
    if fault["type"] == "extra_forbidden":
        known = [*DatasetConfig.model_fields, *DataConfig.model_fields, *Config.model_fields]
        close = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
        return f"{key_path}: unknown key" + (f"; did you mean {close[0]}?" if close else "")
    if fault["type"] == "too_short":
        return f"{key_path}: needs at least one dataset"
    is_mapping_missing = fault["type"] == "model_type"
    message = "expected a mapping" if is_mapping_missing else fault["msg"].removeprefix("Value error, ")
    return f"{key_path}: {message} (got {_shorten(fault['input'])})"


def _shorten(value: Any, length: int = 80) -> str:
    """Write a value in at most `length` characters.

    This takes no longer if YAML aliases make a value of millions of items.
    """
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 2, length, length
    text = short.repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."
