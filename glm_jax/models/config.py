"""Config dataclasses from `config.json`, in both spellings, and back in the older one."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from glm_jax.errors import UserError

_PLAIN = {int: (int,), float: (int, float), bool: (bool,), str: (str,),
          int | None: (type(None), int)}
_MOST_LABELS = 10**6  # each has a name in the config, if only LABEL_0, LABEL_1 …


@dataclasses.dataclass(frozen=True)
class Config:
    """What the configs of all architectures share; fields have the released names.

    Attributes:
      id2label: names of the classes, by id; the number of classes follows from it.
      extra: fields of the file that the model does not use, kept for the way back.
      supported: the values that a field may have where we compute only some of them.
      streams: how many positions a token has. With two, the first stays and the second counts
        in what is generated, behind `start_token_id`.
    """

    # Out of the hash, since a dict has none: a module's static part must be hashable for jit.
    id2label: Mapping[int, str] | None = dataclasses.field(default=None, hash=False)
    num_labels: int = 2
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    supported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    streams: ClassVar[int] = 1

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Reads the fields of a `config.json`.

        transformers 4 writes `rope_theta`, `partial_rotary_factor`, `rope_scaling` and
        `torch_dtype`, transformers 5 `rope_parameters` and `dtype`; both are read.

        Raises:
          UserError: for a value that this library does not compute, or of a wrong type.
        """
        raw = dict(raw)
        for name in ("rope_scaling", "rope_parameters"):
            if not isinstance(raw.get(name), Mapping | None):
                raise UserError(f"config.json: {name} must be a table, not {raw[name]!r}")
        rope = {**(raw.get("rope_scaling") or {}), **(raw.pop("rope_parameters", None) or {})}
        if rope:
            kind = rope.pop("type", "default")
            kind = rope.pop("rope_type", kind)
            for name in ("rope_theta", "partial_rotary_factor"):
                if name in rope:
                    raw[name] = rope.pop(name)
            # Both of its names, which transformers has read at one time or another.
            raw["rope_scaling"] = (None if kind == "default" else
                                   {"type": kind, "rope_type": kind, **rope})
        if "dtype" in raw:
            raw["torch_dtype"] = raw.pop("dtype")
        raw.pop("label2id", None)  # says nothing else, and is written from id2label
        if names := raw.get("id2label"):
            try:
                raw["id2label"] = {int(k): str(v) for k, v in names.items()}
            except (AttributeError, ValueError):
                raise UserError("config.json: id2label must be a table of class numbers and "
                                f"names, not {names!r}") from None
            raw["num_labels"] = len(names)
        types = {f.name: f.type for f in dataclasses.fields(cls) if f.name != "extra"}
        for name, values in cls.supported.items():
            value = raw.get(name, values[0])
            if value not in values:
                raise UserError(f"config.json: {name}={value!r} is not supported; "
                                f"supported: {', '.join(map(repr, values))}")
        for name in types.keys() & raw.keys():
            wanted = _PLAIN.get(types[name])  # type: ignore[arg-type]
            if wanted and type(raw[name]) not in wanted:
                raise UserError(f"config.json: {name} must be {wanted[-1].__name__}, "
                                f"not {raw[name]!r}")
            if types[name] in (int, float) and not 0 <= raw[name] < math.inf:
                raise UserError(f"config.json: {name} must be 0 or more, not {raw[name]!r}")
        if raw.get("num_labels", 0) > _MOST_LABELS:
            raise UserError(f"config.json: num_labels={raw['num_labels']}: at most {_MOST_LABELS} "
                            "are supported")
        if "partial_rotary_factor" in types and not 0 < raw.get("partial_rotary_factor", 1) <= 1:
            raise UserError("config.json: partial_rotary_factor must be above 0 and at most 1, not "
                            f"{raw['partial_rotary_factor']!r}")
        ends = raw.get("eos_token_id")
        ends = ends if isinstance(ends, list | tuple) else [ends]
        if any(i is not None and type(i) is not int for i in ends):
            raise UserError("config.json: eos_token_id must be a token's number, not "
                            f"{raw['eos_token_id']!r}")
        known = {name: raw.pop(name) for name in list(raw) if name in types}
        return cls(**known, extra=raw)

    def to_dict(self) -> dict[str, Any]:
        """The older spelling, which both generations of transformers read."""
        out = dict(self.extra)
        for field in dataclasses.fields(self):
            if field.name not in ("extra", "id2label", "num_labels"):
                out[field.name] = getattr(self, field.name)
        names = self.id2label
        if not names and self.num_labels != 2:  # else the number of classes would be lost
            names = {i: f"LABEL_{i}" for i in range(self.num_labels)}
        if names:
            out["id2label"] = {str(k): v for k, v in names.items()}
            out["label2id"] = {v: k for k, v in names.items()}
        return out


class MultiHeadConfig(Config):
    """What follows where queries, keys and values have as many heads."""

    hidden_size: int
    num_attention_heads: int

    @property
    def num_key_value_heads(self) -> int:
        return self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def want_parts(name: str, size: int, parts_name: str, parts: int) -> None:
    """Raises a UserError unless the field `name` is a multiple of the field `parts_name`."""
    if not size or not parts or size % parts:
        raise UserError(f"config.json: {name}={size} is no multiple of {parts_name}={parts}")
