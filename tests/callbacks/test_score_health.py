"""Warnings of a lagging fake score and of a collapsing generator, once each."""

import warnings

import pytest
import torch
from tiny_module import TinyMethod, trainer

from callbacks.score_health import ScoreHealth


class Scores(TinyMethod):
    """Logs the diagnostics that a test gives for each step."""

    def __init__(self, leads, spreads):
        super().__init__()
        self.leads, self.spreads = leads, spreads

    def training_step(self, batch, batch_idx):
        step = self.trainer.global_step
        self.log("score/lead", torch.tensor(self.leads[step]))
        self.log("generator/std", torch.tensor(self.spreads[step]))
        return super().training_step(batch, batch_idx)


def said(tmp_path, leads, spreads, every=1, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callbacks = [ScoreHealth(**options)]
        trainer(tmp_path, len(leads), callbacks, log_every_n_steps=every).fit(Scores(leads, spreads))
    return [str(w.message) for w in caught if "method.lr" in str(w.message)]


def test_a_healthy_run_says_nothing(tmp_path):
    noisy = [0.1, -0.1] * 15  # single batches scatter, their mean does not
    assert said(tmp_path, noisy, [0.5] * 30) == []


def test_a_lagging_fake_score_is_told_once(tmp_path):
    (text,) = said(tmp_path, [0.1] * 5 + [-0.2] * 25, [0.5] * 30)
    assert "the fake score lags behind the generator at step 10" in text
    assert "raise method.fake_updates or method.fake_lr_factor" in text


def test_a_collapse_is_told_again_after_it_was_over(tmp_path):
    spreads = [0.5] * 12 + [0.05] * 4 + [0.5] * 4 + [0.04] * 4
    texts = said(tmp_path, [0.1] * 24, spreads)
    assert ["at step 13" in texts[0], "at step 21" in texts[1]] == [True, True]
    assert "spread by 0.05 per pixel, 0.5 before" in texts[0]


def test_an_untrained_generator_of_narrow_spread_is_no_collapse(tmp_path):
    """At sigma_init 80 it begins as almost one image."""
    assert said(tmp_path, [0.1] * 30, [0.01 * 1.2**i for i in range(30)]) == []


def test_methods_without_these_diagnostics_are_left_alone(tmp_path):
    trainer(tmp_path, 12, [ScoreHealth()]).fit(TinyMethod())


@pytest.mark.parametrize("options", [{"lag": -1}, {"collapse": 0}, {"collapse": 1}])
def test_misuse(options):
    with pytest.raises(ValueError, match=r"ScoreHealth: need 0 <= lag < 1 and 0 < collapse < 1"):
        ScoreHealth(**options)
