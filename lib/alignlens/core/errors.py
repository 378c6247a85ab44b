"""The one exception family: each message says what is wrong, where, and what to do about it."""


class AlignlensError(Exception):
    """Base of all errors that alignlens raises on purpose."""


class PresetError(AlignlensError):
    """A parameter of the study is unknown, mistyped or out of range."""


class PreferenceError(AlignlensError):
    """A preference file, row or field cannot be used."""


class StoreError(AlignlensError):
    """A stored artifact is damaged, unreadable or half-written."""


class ModelError(AlignlensError):
    """A model or tokenizer cannot be loaded, or fails its checks."""


class AlignError(AlignlensError):
    """A variant cannot be trained as asked."""


class ActivationError(AlignlensError):
    """Activations cannot be read, or hold values no instrument may see."""


class ProbeError(AlignlensError):
    """A probe was asked for something its data cannot answer."""


class DictionaryError(AlignlensError):
    """A dictionary cannot be trained, read or applied as asked."""


class GeometryError(AlignlensError):
    """Two sets of activations cannot be compared as asked."""


class CausalError(AlignlensError):
    """An intervention cannot be made or measured as asked."""


class ClaimError(AlignlensError):
    """A ledger, or a table it was asked to judge, has not the form that the rules need."""


class AuditError(AlignlensError):
    """An audit cannot be made of these models, pairs or parameters, or a report cannot be read."""


class NotMeasured(AlignlensError):
    """A section of an audit cannot be measured on these data; the audit goes on without it."""
