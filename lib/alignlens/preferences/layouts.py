"""Which columns of a file hold what, and what they say about how sure its labels are."""

import re
from itertools import product

import pandas as pd

from alignlens.core.errors import PreferenceError
from alignlens.preferences.rows import COMPLETIONS, LABELS, PAIRS, BadRow, cell, is_blank

PROMPTS = ("prompt", "instruction", "question", "query", "input", "conversations", "conversation", "messages")
CONTEXT = {"system": ("system", "system_prompt"), "history": ("history",), "input": ("input",)}
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
TEXT_COLUMNS = {*PROMPTS, "system", "system_prompt", *sum((*ANSWERS, *TWO), ())} - {"label", "kto_tag"}

TIES = {"tie", "both", "neither", "draw", "equal", "same", "none", "bothbad"}
# Columns (also is_ and so) and what they say when a row is not to be used.
FLAGS = {"valid": False, "invalid": True, "tie": True, "tied": True, "both_bad": True}
SURE = set("margin confidence certainty agreement strength preference valid invalid tie tied noise votes".split())


def _word(value):
    return str(value).strip().lower()


def _number(value):
    try:
        return None if isinstance(value, bool) or is_blank(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


class Layout:
    """Where the rows of one file hold their texts: ``cells`` gives those of a row under the names of their fields.

    Raises PreferenceError, which says what to rename, if the columns do not tell."""

    def __init__(self, name, rows):
        rows = [row for row in rows if isinstance(row, dict)]
        self.columns = list(dict.fromkeys(column for row in rows for column in row))
        self._known = {_word(column): column for column in reversed(self.columns)}
        self.fields, self._pick, self._picked = PAIRS, None, ()
        has = self._known.keys()
        better, answers, scores = (self._first(names) for names in (BETTER, SEVERAL, SCORES))
        names = next((names for names in ANSWERS if has >= set(names)), None)
        two = next(([*map(self._known.get, names)] for names in TWO if has >= set(names)), None)
        if names:
            self.fields = PAIRS if ANSWERS.index(names) < 7 else COMPLETIONS
        elif two and better:
            self._pick, self._picked = _better_of_two, (*two, better)
            self._check_better(name, [row.get(better) for row in rows])
        elif answers and scores:
            self._pick, self._picked = _best_and_worst, (answers, scores)
        elif self.columns:
            raise PreferenceError(f"{name}: {self._advice(two)}")
        taken = [*(names or ()), *map(_word, self._picked)]
        places = {"prompt": self._first(PROMPTS, taken)}
        taken.append(_word(places["prompt"]))
        places |= {field: self._first(known, taken) for field, known in CONTEXT.items()}
        places |= zip(self.fields[1:], map(self._known.get, names or ()), strict=False)
        self.places = {field: column for field, column in places.items() if column is not None}
        self.others = [c for c in self.columns if c not in (*self.places.values(), *self._picked, *self.fields)]
        self._flags = {self._known[w]: bad for w in has if (bad := FLAGS.get(w.removeprefix("is_"))) is not None}
        self._ties = [self._known[word] for word in BETTER if word in has]

    def _first(self, names, taken=()):
        return next((self._known[name] for name in names if name in self._known and name not in taken), None)

    def _advice(self, two):
        missing = " and no column ".join(repr(column) for column in PAIRS[1:] if column not in self.columns)
        advice = "Name them prompt, chosen, rejected (or prompt, completion, label)."
        if two:
            advice = (
                f"Say in a column 'winner' which of {' and '.join(two)} is better, or rename them chosen and rejected."
            )
        elif self._first((*SEVERAL, "response", "output")):
            advice += " Of several scored answers, put the best into chosen and the worst into rejected."
        return f"no column {missing}; it has {', '.join(self.columns)}. {advice}"

    def _check_better(self, name, values):
        """Numbers that do not fit the names of the answers would be read the wrong way round."""
        one, other, column = self._picked
        numbers = {number for value in values if (number := _number(value)) is not None and number == number}
        low, high = {"a": (1, 0), "0": (0, 1), "1": (0, 2)}[one[-1].lower()]
        fits = all(low <= number <= high for number in numbers) and not (
            high == 2 and max(numbers, default=2) == 1 and 0 in numbers
        )
        if _word(column) != STRENGTH and not fits:
            shown = ", ".join(f"{number:g}" for number in sorted(numbers)[:5])
            words = f"column {column!r} holds {shown}, which does not say whether {one} or {other} is better"
            raise PreferenceError(f"{name}: {words}. Rename the better one chosen and the other rejected.")

    def cells(self, row):
        if not isinstance(row, dict):
            raise BadRow("broken_json", None, "is not a JSON object with named fields")
        for column, bad in self._flags.items():
            if LABELS.get(_word(row.get(column))) == bad:
                raise BadRow("invalid", column, f"is {row[column]}: the file itself does not count this row")
        for column in self._ties:
            if TIES & set(re.split("[^a-z]+", "" if is_blank(row.get(column)) else _word(row[column]))) or (
                _word(column) == STRENGTH and _number(row.get(column)) == 0
            ):
                raise BadRow("tie", column, f"is {row[column]}: no answer is preferred")
        found = {field: cell(row.get(column), field, field == "history") for field, column in self.places.items()}
        if self._pick:
            found |= zip(PAIRS[1:], self._pick(row, *self._picked), strict=True)
        return found

    @property
    def words(self):
        """Which columns were read as what, where their names do not say so."""
        picked = {"chosen and rejected": ", ".join(self._picked)} if self._picked else {}
        return "; ".join(f"{field} from {name}" for field, name in (self.places | picked).items() if field != name)


def _better_of_two(row, one, other, column):
    ends, number = [one[-1].lower(), other[-1].lower()], _number(row.get(column))
    end = re.split("[^a-z0-9]+", _word(row.get(column)))[-1]
    if number is not None and _word(column) == STRENGTH:
        end = ends[number > 0]
    elif number is not None:
        if ends == ["1", "2"] and number in (0, 1.5):
            raise BadRow("tie", column, f"is {number:g}: no answer is preferred")
        end = str(round(number)) if ends == ["1", "2"] else f"{number:g}"
    if end not in ends:
        raise BadRow("label", column, f"is {row.get(column)!r}, which names neither {one} nor {other}")
    found = [cell(row.get(one), one), cell(row.get(other), other)]
    return found if end == ends[0] else found[::-1]


def _best_and_worst(row, answers, scores):
    texts, values = (cell(row.get(name), name, True) for name in (answers, scores))
    values = [_number(value) for value in values] if isinstance(values, list) else []
    if not isinstance(texts, list) or len(texts) != len(values) or len(texts) < 2 or None in values:
        raise BadRow("label", scores, f"is not a list of as many numbers as there are {answers}, two or more")
    best, worst = values.index(max(values)), values.index(min(values))
    if best == worst:
        raise BadRow("tie", scores, "are all equal: no answer is preferred")
    return texts[best], texts[worst]


def judge_labels(pairs, columns, report):
    """Count the pairs whose own scores contradict them or are equal, and name the columns about that."""
    against, equal, seen = pd.Series(False, pairs.index), pd.Series(False, pairs.index), []
    for column in pairs.columns:
        names = [column.replace("chosen", other) for other in ("rejected", "reject") if "chosen" in column]
        twin = next(
            (name for name in names if name in pairs.columns and re.search("score|rating|reward", column)), None
        )
        if twin or _word(column) == "margin":
            gap = _numbers(pairs[column]) - (_numbers(pairs[twin]) if twin else 0)
            against, equal, seen = against | (gap < 0), equal | (gap == 0), [*seen, column, twin or column]
    seen += [column for column in columns if SURE & set(re.split("[^a-z]+", _word(column)))]
    if seen:
        report |= {"scores_contradict": int(against.sum()), "scores_equal": int((equal & ~against).sum())}
        report["label_columns"] = ", ".join(dict.fromkeys(seen))


def _numbers(column):
    return pd.Series([_number(value) for value in column], column.index, dtype=float)
