"""What the user asked for: a scheme, the steps that lead to it, and what is different for some modules."""

import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import reduce
from importlib import resources
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from halfbyte import scheme
from halfbyte.errors import RecipeError
from halfbyte.methods import METHODS
from halfbyte.methods.contract import CacheSmoothing, Refinement, Rotation, Rounding, Transform
from halfbyte.methods.wkvquant import WKVQuant
from halfbyte.scheme import ActivationFormat, Scheme, Value, WeightFormat

Step = Annotated[reduce(or_, METHODS.values()), Field(discriminator="method")]


class Recipe(Value):
    """A scheme, ordered steps and per-module overrides. Build it in Python, or `Recipe.load` a name or a file."""

    name: str = "custom"
    summary: str = ""
    scheme: Scheme = Scheme()
    steps: tuple[Step, ...] = ()  # pyright: ignore[reportInvalidTypeForm]
    overrides: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Glob on the module's path -> fields of the weight format that differ there, and `activations` with the fields of
    the activation format that do (null: 16 bit); the last match wins."""
    ignore: tuple[str, ...] = ("lm_head",)
    """Globs on module paths that stay as they are. Embeddings and the head are outside the blocks, where the scheme alone
    says what is quantized."""
    sequential: bool = False
    """Gather each layer's statistics after the layers before it in the block are rounded (GPTQ's `true_sequential`)."""
    starved: Literal["error", "round"] = "error"
    """What to do with an expert that saw fewer than `minimum_tokens`: stop, or round it to nearest."""
    minimum_tokens: int = Field(default=32, ge=1)

    @field_validator("overrides")
    @classmethod
    def _overrides_are_formats(cls, overrides: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for fields in overrides.values():
            weights = {key: value for key, value in fields.items() if key != "activations"}
            WeightFormat.model_validate(WeightFormat().model_dump() | weights)
            if fields.get("activations") is not None:
                ActivationFormat.model_validate(ActivationFormat().model_dump() | fields["activations"])
        return overrides

    @model_validator(mode="after")
    def _steps_fit_the_scheme(self) -> "Recipe":
        if self.scheme.weights is not None:
            verbs = (Rotation, Transform, Rounding, Refinement, CacheSmoothing)
            order = [next(place for place, verb in enumerate(verbs) if isinstance(step, verb)) for step in self.steps]
            if order.count(verbs.index(Rounding)) != 1:
                raise ValueError("exactly one step must round the weights: rtn or gptq")
            if order != sorted(order) or order.count(verbs.index(Rotation)) > 1:
                raise ValueError(
                    "steps go in this order: one rotation such as quarot, transforms such as awq, one rounding, "
                    "refinements such as lkd, and wkv for the cache"
                )
        elif others := [step.method for step in self.steps if not _only_smooths(step)]:
            raise ValueError(
                f"without `scheme.weights` there is nothing to do for {', '.join(others)}: give the format"
            )
        smoothing = [step.method for step in self.steps if isinstance(step, CacheSmoothing)]
        if len(smoothing) > 1 or (smoothing and self.scheme.cache is None):
            raise ValueError(f"{smoothing[0]} smooths one quantized cache: give `scheme.cache`, and the step once")
        if not smoothing and any(isinstance(step, WKVQuant) and step.learn != "clipping" for step in self.steps):
            raise ValueError(
                "wkvquant learns the cache's shifts and scales from those that are found: add the step wkv"
            )
        return self

    @property
    def rotation(self) -> Rotation | None:
        return next((step for step in self.steps if isinstance(step, Rotation)), None)

    @property
    def transforms(self) -> tuple[Transform, ...]:
        return tuple(step for step in self.steps if isinstance(step, Transform))

    @property
    def rounding(self) -> Rounding:
        # weights that stay as they are ask as little of calibration as those that are rounded to nearest
        return next((step for step in self.steps if isinstance(step, Rounding)), METHODS["rtn"]())

    @property
    def smoothing(self) -> CacheSmoothing | None:
        return next((step for step in self.steps if isinstance(step, CacheSmoothing)), None)

    @property
    def refinements(self) -> tuple[Refinement, ...]:
        return tuple(step for step in self.steps if isinstance(step, Refinement))

    @property
    def needs_data(self) -> bool:
        """Whether any step looks at activations, or a format needs something that only they can tell."""
        looking = bool(self.transforms or self.refinements or self.smoothing)
        return looking or self.rounding.needs_data or self.needs_ranges

    @property
    def needs_ranges(self) -> bool:
        """Whether some activation format waits for ranges from calibration."""
        formats = [self.scheme.activations, *(self._activations(changes) for changes in self.overrides.values())]
        return any(format.needs_data for format in formats if format is not None)

    @property
    def keeps_columns(self) -> bool:
        """Whether some weights are also kept in 16 bit, for the columns that activations single out."""
        formats = [self.scheme.activations, *(self._activations(changes) for changes in self.overrides.values())]
        return any(format.outliers is not None and format.outliers.weights == "kept" for format in formats if format)

    @property
    def needs_float_stream(self) -> bool:
        """Whether the float model must run beside the quantized one."""
        return self.rounding.needs_drift or bool(self.refinements)

    def format_of(self, path: str) -> WeightFormat | None:
        """The weight format of the module at `path`; None where the recipe leaves it alone."""
        if self.scheme.weights is None or self._ignored(path):
            return None
        fields = self.scheme.weights.model_dump()
        for changes in self._changes(path):
            fields |= {key: value for key, value in changes.items() if key != "activations"}
        return WeightFormat.model_validate(fields)

    def activations_of(self, path: str) -> ActivationFormat | None:
        """How the input of the module at `path` is quantized; None where it stays in 16 bit."""
        found = None if self._ignored(path) else self.scheme.activations
        for changes in self._changes(path):
            found = self._activations(changes) if "activations" in changes else found
        return found

    def _activations(self, changes: Mapping[str, Any]) -> ActivationFormat | None:
        if changes.get("activations") is None:
            return None
        whole = self.scheme.activations or ActivationFormat()
        return ActivationFormat.model_validate(whole.model_dump() | changes["activations"])

    def _changes(self, path: str) -> list[dict[str, Any]]:
        return [changes for glob, changes in self.overrides.items() if fnmatchcase(path, glob)]

    def _ignored(self, path: str) -> bool:
        return any(fnmatchcase(path, glob) for glob in self.ignore)

    @classmethod
    def load(cls, recipe: "Recipe | str | Path | Mapping[str, Any]") -> "Recipe":
        """A recipe by its shipped name, from a YAML or TOML file, or from a mapping. RecipeError says what is wrong."""
        if isinstance(recipe, Recipe):
            return recipe
        if isinstance(recipe, Mapping):
            return cls._checked(recipe, "the recipe")
        path = Path(recipe)
        if path.suffix in (".yaml", ".yml", ".toml"):
            if not path.is_file():
                raise RecipeError(f"there is no recipe file {path}")
            return cls._checked(_parse(path.read_text(), path.suffix, str(path)), str(path))
        names = shipped()
        if str(recipe) not in names:
            raise RecipeError(f"no recipe {str(recipe)!r}{_hint(str(recipe), names)}; there are {', '.join(names)}")
        return cls._checked(_parse(_shipped_text(str(recipe)), ".yaml", str(recipe)), str(recipe))

    @classmethod
    def _checked(cls, fields: Mapping[str, Any], where: str) -> "Recipe":
        try:
            return cls.model_validate(fields)
        except ValidationError as cause:
            problems = "; ".join(_explain(error) for error in cause.errors())
            raise RecipeError(f"{where}: {problems}") from cause

    def dump(self) -> str:
        """The recipe as YAML, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def shipped() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("halfbyte") / "recipes"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def recipes() -> dict[str, str]:
    """The shipped recipes: name -> what it is for."""
    return {name: Recipe.load(name).summary for name in shipped()}


def _only_smooths(step: Any) -> bool:
    """Whether a step leaves weights alone."""
    return isinstance(step, CacheSmoothing) or (isinstance(step, WKVQuant) and step.learn == "cache")


def _shipped_text(name: str) -> str:
    return (resources.files("halfbyte") / "recipes" / f"{name}.yaml").read_text()


def _parse(text: str, suffix: str, where: str) -> Mapping[str, Any]:
    try:
        fields = tomllib.loads(text) if suffix == ".toml" else yaml.safe_load(text)
    except (yaml.YAMLError, tomllib.TOMLDecodeError) as cause:
        raise RecipeError(f"{where} is not valid {'TOML' if suffix == '.toml' else 'YAML'}: {cause}") from cause
    if not isinstance(fields, Mapping):
        raise RecipeError(f"{where} must be a mapping with `scheme` and `steps`, and is a {type(fields).__name__}")
    return fields


def _explain(error: Any) -> str:
    """One pydantic error in words, with what was probably meant."""
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        key = str(error["loc"][-1])
        known = _known_keys(error["loc"][:-1])
        return f"unknown key {place!r}{_hint(key, known)}"
    if error["type"] in ("union_tag_invalid", "union_tag_not_found") and "steps" in error["loc"]:
        given = str((error.get("ctx") or {}).get("tag", ""))
        return f"{place}: no method {given!r}{_hint(given, METHODS)}; there are {', '.join(METHODS)}"
    return f"{place or 'recipe'}: {error['msg']} (given: {error['input']!r})" if place else str(error["msg"])


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    """The keys that were possible at a place of the recipe."""
    if not location:
        return list(Recipe.model_fields)
    methods = [METHODS[part] for part in location if part in METHODS]
    values = [kind for kind in vars(scheme).values() if isinstance(kind, type) and issubclass(kind, Value)]
    return [key for kind in methods or values for key in kind.model_fields]


def _hint(word: str, choices: Any) -> str:
    close = get_close_matches(word, list(choices), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
