"""What a library says while it works is for its user: no bar for each of the models of a pair, no remark on our settings."""

import warnings
from logging import WARNING, Handler

from transformers.generation import configuration_utils
from transformers.utils import logging

from dera_merge import ModelPair, demo


class Heard(Handler):
    """Keeps what is logged."""

    def __init__(self, said: list[str]) -> None:
        super().__init__()
        self.said = said

    def emit(self, record):
        self.said.append(record.getMessage())


def test_a_pair_is_loaded_and_decodes_without_bars_and_remarks(capfd, monkeypatch):
    logging.enable_progress_bar()
    said = []
    log = configuration_utils.logger
    monkeypatch.setattr(log, "handlers", [Heard(said)])
    monkeypatch.setattr(log, "level", WARNING)
    logging.warning_once.cache_clear()  # or what an earlier test has heard would not be said again
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        pair = ModelPair.from_pretrained(demo.REF, demo.ALIGNED_LORA)
        inputs = pair.tokenizer("The hotel", return_tensors="pt")
        pair.exact(0.5).generate(**inputs, max_new_tokens=2)
        pair.merged(0.5)
    assert [str(w.message) for w in warned if issubclass(w.category, FutureWarning)] == []
    assert said == []
    assert "Loading weights" not in capfd.readouterr().err
    assert logging.is_progress_bar_enabled()
