"""The tokenizer and the chat template of a merged model, as the recipe chooses them."""

from collections import Counter
from collections.abc import Mapping

from deltaworks.catalog.models import Model
from deltaworks.checkpoints.sidecars import chat_template, vocabulary
from deltaworks.errors import RecipeError
from deltaworks.merging.recipe import Recipe


def choose_tokenizer(recipe: Recipe, models: Mapping[str, Model]) -> str | None:
    """The reference of the model whose tokenizer the output gets; None where the recipe does not say.

    Raises:
        RecipeError: the recipe names no such model, or the models have different vocabularies.
        CheckpointError: a tokenizer cannot be read.
    """
    source = recipe.tokenizer_source
    if source is None:
        return None
    donor = recipe.base_model if source == "base" else next(iter(models)) if source == "union" else source
    if donor is None:
        raise RecipeError("tokenizer_source: base needs a base_model")
    if donor not in models:
        raise RecipeError(f"tokenizer_source: {donor!r} is not one of the models of the recipe")
    wanted = vocabulary(models[donor].path)
    for reference, model in models.items():
        if vocabulary(model.path) != wanted:
            raise RecipeError(
                f"tokenizer_source: {reference!r} has another vocabulary than {donor!r}; rows of embeddings cannot be"
                " matched up here: align the vocabularies first"
            )
    return donor


def choose_template(recipe: Recipe, models: Mapping[str, Model]) -> str | None:
    """The chat template to install; None to keep the tokenizer's.

    Raises:
        RecipeError: the recipe's is not a template.
        CheckpointError: a template cannot be read.
    """
    wanted = recipe.chat_template
    if wanted is None:
        return None
    if wanted == "auto":
        found = Counter(t.strip() for m in models.values() if (t := chat_template(m.path)))
        return found.most_common(1)[0][0] if found else None
    if "{" not in wanted:
        raise RecipeError(f"chat_template: expected a Jinja template or 'auto', not {wanted!r}")
    return wanted
