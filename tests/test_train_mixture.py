"""What a run makes of its data: best-fit rows, worker processes, a mixture that changes on the way, tokens seen."""

import json
import multiprocessing

import pytest
from small_runs import assert_same_bits, events, figures, launch, losses

from moect.data.batches.loader import Loader
from moect.data.vocabulary.tokenizer import load_tokenizer
from moect.train.loop import train

BEST_FIT = {"packing": "best-fit"}


def test_interrupted_with_worker_processes_and_resumed_without_ends_with_the_same_bits(place):
    whole = train(place.config("whole", data=BEST_FIT))
    run = train(place.config(data={**BEST_FIT, "workers": 1}, train={"stop_after": 3}))
    assert multiprocessing.active_children() == []
    train(place.config(data=BEST_FIT, resume="auto"))
    assert losses(run) == losses(whole)
    assert_same_bits(run, whole, 6)


def test_a_mixture_changed_on_resume_is_told_and_tokens_seen_are_counted_on(place, capsys):
    train(place.config(train={"stop_after": 3}))
    values = place.values(resume="auto", data={"replay": 0.5})
    values["data"]["train"] = [{**source, "weight": 2.0} for source in values["data"]["train"]]
    changed = place.config(resume="auto", data=values["data"])
    capsys.readouterr()
    run = train(changed)
    (event,) = [event for event in events(run) if event["event"] == "mixture"]
    now, before = {"en.train.jsonl": 0.5, "cy.train.jsonl": 0.5}, {"en.train.jsonl": 0.25, "cy.train.jsonl": 0.75}
    assert event == {"event": "mixture", "step": 3, "row": 24, "before": before, "now": now}
    out = capsys.readouterr().out
    assert "changed: data.replay: 0.25 -> 0.5" in out and "en.train.jsonl: 25.00% -> 50.00%" in out
    assert "changed: weights of data.train: [None, None] -> [2.0, 2.0]" in out
    loader = Loader(changed, load_tokenizer(changed.model), place.output / ".cache")
    position = json.loads((run / "checkpoints" / "step-6" / "checkpoint.json").read_text())["data"]
    assert position["drawn"] == {"en.train.jsonl": 6 + 12, "cy.train.jsonl": 18 + 12}
    loader.load_state_dict(position)
    assert figures(run)[6]["tokens_seen"] == loader.tokens_seen()
    seen = [line["tokens_seen"]["en"] for _, line in sorted(figures(run).items())]
    assert all(a < b for a, b in zip(seen[:-1], seen[1:], strict=True)) and len(seen) == 6
    # epochs of the plan: what was drawn before the change and what is drawn after it
    (english, _) = json.loads((run / "plan.json").read_text())["mixture"]
    assert english["epochs"] == pytest.approx(18 / loader.packed[0].rows_per_epoch)


@pytest.mark.slow
def test_two_ranks_with_workers_and_then_one_without_read_what_one_rank_reads(place):
    path = place.write(place.config(data={**BEST_FIT, "workers": 1}, train={"micro_batch": 2}))
    launch(path, 2, "train.stop_after=3")
    launch(path, 1, "resume=auto", "data.workers=0")
    alone = train(place.config("alone", data=BEST_FIT))
    run = place.output / "run"
    assert losses(run) == pytest.approx(losses(alone), abs=1e-4)
    seen = [[line["tokens_seen"] for _, line in sorted(figures(r).items())] for r in (run, alone)]
    assert seen[0] == seen[1]
