"""Hints for names that are unknown here: what they may mean."""

import pytest

from fastkd.config import Recipe
from fastkd.utils import hints

ELSEWHERE = {  # arguments beside the fields, and those of other commands
    *("checkpoint", "output", "recipe", "resume", "top", "weights")
}


def test_every_name_that_is_hinted_at_exists():
    names, notes = hints.foreign_names()["names"], hints.foreign_names()["notes"]
    assert names.keys() - Recipe.model_fields.keys() == ELSEWHERE
    assert notes.keys() <= names.keys()


def test_no_name_that_exists_is_called_foreign():
    tables = hints.foreign_names()
    foreign = set(" ".join(tables["names"].values()).split()) | tables["absent"].keys()
    assert not foreign & Recipe.model_fields.keys()


@pytest.mark.parametrize(
    ("word", "known", "hint"),
    [
        ("--wd", ["--weight-decay", "--lr"], " (here it is --weight-decay)"),
        ("use_ema", ["weights", "workers"], " (here it is 'weights')"),
        ("use_ema", ["ema_decay"], " (here it is 'ema_decay'; none switches it off)"),
        ("smoothing", ["workers"], ""),  # of a command that has no such thing
        ("pretrained", ["workers"], ""),
        ("Batch-Size", ["batch_size", "eval_batch_size"], " (did you mean 'batch_size'?)"),
        ("zzz", ["lr"], ""),
    ],
)
def test_a_hint_names_what_there_is(word, known, hint):
    assert hints.suggestion(word, known) == hint
