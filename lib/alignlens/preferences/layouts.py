"""Which columns of a file hold what, and what they say about how sure its labels are."""

import math
import re
from itertools import product

import pandas as pd

from alignlens.core.errors import PreferenceError
from alignlens.preferences.prompts import Unusable, refuse_if
from alignlens.preferences.rows import COMPLETIONS, LABELS, PAIRS, cell, is_blank

PROMPTS = ("prompt", "instruction", "question", "query", "input", "conversations", "conversation", "messages")
CONTEXT = {"system": ("system", "system_prompt"), "history": ("history",), "input": ("input",)}
KTO = {"label", "kto_tag"}
# Columns that hold chosen and rejected, or a completion and its label.
ANSWERS = (
    ("chosen", "rejected"), ("chosen", "reject"), ("chosen_response", "rejected_response"),
    ("response_j", "response_k"), ("preferred_output", "non_preferred_output"),
    ("messages", "rejected_response"), ("messages", "rejected_messages"),
    ("completion", "label"), ("completion", "kto_tag"), ("output", "kto_tag"), ("messages", "kto_tag"),
    ("response", "label"),
)  # fmt: skip
# Two answers of which another column names the better one, by its end or, a strength, by its sign.
BASES = ("response", "output", "answer", "completion", "conversation")
TWO = [(f"{base}_{one}", f"{base}_{other}") for base, (one, other) in product(BASES, ("ab", "01", "12"))]
STRENGTH = "preference_strength"
BETTER = ("preference", "winner", "better_response_id", "safer_response_id", "preferred", "choice", STRENGTH)
# A list of answers and a list of their scores.
SEVERAL = ("responses", "completions", "answers", "outputs", "candidates", "all_generated_responses")
SCORES = ("scores", "ratings", "rewards", "all_rm_scores")
TEXT_COLUMNS = {*PROMPTS, "system", "system_prompt", *sum((*ANSWERS, *TWO), ())} - KTO

TIES = re.compile("(tied?|both|neither|draw|equal|same|none)(?![a-z]).{0,12}$")  # "tie (bothbad)" too, but no sentence
# Columns (also is_ and so) and what they say when a row is not to be used.
FLAGS = {"valid": False, "invalid": True, "tie": True, "tied": True, "both_bad": True}
OWN_SCORE = re.compile("score|rating|reward")
SURE = set(
    "margin confidence certainty agreement strength preference valid invalid tie tied noise votes safer flipped".split()
)


def _word(value):
    return "" if is_blank(value) else str(value).strip().lower()


def _number(value):
    try:
        number = math.nan if isinstance(value, bool) or is_blank(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


class Layout:
    """Where the rows of one file hold their texts: ``cells`` gives those of a row under the names of their fields.

    ``others`` are the columns that it does not read. Raises PreferenceError, which says what to rename, if unclear."""

    def __init__(self, name, rows):
        rows = [row for row in rows if isinstance(row, dict)]
        columns = dict.fromkeys(column for row in rows for column in row)
        self._columns = {_word(column): column for column in reversed(columns)}
        self.fields, self._pick, self._picked = PAIRS, None, ()
        better, answers, scores = (self._first(names) for names in (BETTER, SEVERAL, SCORES))
        names = next((names for names in ANSWERS if self._columns.keys() >= {*names}), ())
        two = next(([*map(self._columns.get, names)] for names in TWO if self._columns.keys() >= {*names}), None)
        if names:
            self.fields = COMPLETIONS if names[1] in KTO else PAIRS
        elif two and better:
            self._pick, self._picked = _better_of_two, (*two, better)
            _check_better(name, *self._picked, [row.get(better) for row in rows])
        elif answers and scores:
            self._pick, self._picked = _best_and_worst, (answers, scores)
        elif columns:
            raise PreferenceError(f"{name}: {self._advice(columns, two)}")
        taken = [*names, *map(_word, self._picked)]
        places = {"prompt": self._first(PROMPTS, taken)}
        places |= {field: self._first(known, [*taken, _word(places["prompt"])]) for field, known in CONTEXT.items()}
        places |= zip(self.fields[1:], map(self._columns.get, names), strict=False)
        self._places = {field: column for field, column in places.items() if column is not None}
        self.others = [c for c in columns if c not in (*self._places.values(), *self._picked, *self.fields)]

    def _first(self, names, taken=()):
        return next((self._columns[name] for name in names if name in self._columns and name not in taken), None)

    def _advice(self, columns, two):
        missing = " and no column ".join(repr(column) for column in PAIRS[1:] if column not in columns)
        advice = "Name them prompt, chosen, rejected (or prompt, completion, label)."
        if two:
            advice += f" Or say in a column 'winner' which of {' and '.join(two)} is better."
        elif self._first((*SEVERAL, "response", "output")):
            advice += " Of several scored answers, put the best into chosen and the worst into rejected."
        return f"no column {missing}; it has {', '.join(columns)}. {advice}"

    def cells(self, row):
        refuse_if(not isinstance(row, dict), "is not a JSON object with named fields", kind="broken_json")
        for word, column in self._columns.items():
            value, said = row.get(column), _word(row.get(column))
            if LABELS.get(said) == FLAGS.get(word.removeprefix("is_"), "no flag"):
                raise Unusable(f"is {value}: the file itself does not count this row", column, "invalid")
            if word in BETTER and (TIES.match(said) or (word == STRENGTH and _number(value) == 0)):
                raise Unusable(f"is {value}: no answer is preferred", column, "tie")
        found = {field: cell(row.get(column), field, field == "history") for field, column in self._places.items()}
        if any(isinstance(row.get(c), str) and found[field] is not row[c] for field, c in self._places.items()):
            found["spelled"] = True
        if self._pick:
            found |= zip(PAIRS[1:], self._pick(row, *self._picked), strict=True)
        return found

    @property
    def words(self):
        """Which columns were read as what, where their names do not say so."""
        picked = {"chosen and rejected": ", ".join(self._picked)} if self._picked else {}
        return "; ".join(f"{field} from {name}" for field, name in (self._places | picked).items() if field != name)


def _check_better(name, one, other, column, values):
    """Numbers that do not fit the names of the two answers would be read the wrong way round."""
    numbers = sorted({number for value in values if (number := _number(value)) is not None})
    if _word(column) == STRENGTH or not numbers:
        return
    from_1_to_2 = all(number == 0 or 1 <= number <= 2 for number in numbers) and (numbers[0] > 0 or numbers[-1] > 1)
    if not {"a": False, "0": {*numbers} <= {0, 1}, "1": from_1_to_2}[one[-1].lower()]:
        shown = ", ".join(f"{number:g}" for number in numbers[:5])
        words = f"column {column!r} holds {shown}, which does not say whether {one} or {other} is better"
        raise PreferenceError(f"{name}: {words}. Rename the better one chosen and the other rejected.")


def _better_of_two(row, one, other, column):
    """(chosen, rejected) by the column that names the better one of two answers, in numbers 0 and 1, or from 1 to 2."""
    value, ends = row.get(column), [one[-1].lower(), other[-1].lower()]
    end = re.split("[^a-z0-9]+", _word(value))[-1]
    if (number := _number(value)) is not None:
        tied = ends == ["1", "2"] and number in (0, 1.5)
        refuse_if(tied, f"is {value}: no answer is preferred", column, "tie")
        end = ends[number > 0] if _word(column) == STRENGTH else str(round(number))
    refuse_if(end not in ends, f"is {value!r}, which names neither {one} nor {other}", column, "label")
    found = [cell(row.get(name), name) for name in (one, other)]
    return found if end == ends[0] else found[::-1]


def _best_and_worst(row, answers, scores):
    """(chosen, rejected) of a list of answers by the list of their scores."""
    texts, values = (cell(row.get(name), name, True) for name in (answers, scores))
    values = [_number(value) for value in values] if isinstance(values, list) else []
    fit = isinstance(texts, list) and len(texts) == len(values) > 1 and None not in values
    refuse_if(not fit, f"is not a list of as many numbers as there are {answers}, two or more", scores, "label")
    refuse_if(len(set(values)) == 1, "are all equal: no answer is preferred", scores, "tie")
    return [texts[values.index(end(values))] for end in (max, min)]


def judge_labels(pairs, columns, report):
    """Count the pairs whose own scores contradict them or are equal, and name the columns about that."""
    gaps, seen = pd.DataFrame(index=pairs.index), []
    for column in pairs.columns:
        names = [column.replace("chosen", other) for other in ("rejected", "reject") if "chosen" in column]
        twin = next((name for name in names if name in pairs and OWN_SCORE.search(column.lower())), None)
        if twin or _word(column) == "margin":
            one, *other = (pd.Series(map(_number, pairs[name]), pairs.index, float) for name in (column, twin) if name)
            gaps[column] = one - (other[0] if other else 0)
            seen += [column, twin or column]
    seen += [column for column in columns if SURE & {*re.split("[^a-z]+", _word(column))}]
    if seen:
        against, equal = (gaps < 0).any(axis=1), (gaps == 0).any(axis=1)
        report |= {"scores_contradict": int(against.sum()), "scores_equal": int((equal & ~against).sum())}
        report["label_columns"] = ", ".join(dict.fromkeys(seen))
