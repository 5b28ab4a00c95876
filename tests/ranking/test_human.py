"""People in the training loop: a scripted one over HTTP, who ranks real rollouts."""

import pytest

from dgpo.errors import UserError
from dgpo.preferences import read_groups
from dgpo.ranking.store import Store
from dgpo.recipe import Recipe
from dgpo.rewards import load_rewards
from ranking.scripted import Rater, after, bright_half, free_port, hears_ctrl_c
from tiny_runs import light, settings, trainer, without_times

pytest.importorskip("fastapi")


def human(images, prompts):
    """What the scripted person says, as a function."""
    liked = bright_half(images)
    return [float(place in liked) for place in range(len(images))]


human.group_wise = True


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    light(monkeypatch)
    with hears_ctrl_c():
        yield


def run(folder, port, resume=False, **changes):
    rewards = {"human": {"options": {"port": port}}}
    return trainer(folder, reward=None, resume=resume, rewards=rewards, **changes)


def groups(folder):
    return [group.id for group in Store(folder / "ranking").groups()]


def test_a_person_is_a_reward_like_any_other(tmp_path):
    port = free_port()
    person = run(tmp_path / "person", port)
    # the first answer comes when all groups of the iteration wait
    with Rater(port, first=2) as rater:
        person.train()
    trainer(tmp_path / "function", reward=human).train()
    assert without_times(tmp_path / "person") == without_times(tmp_path / "function")
    assert rater.answers == groups(tmp_path / "person") and len(rater.answers) == 4
    ranked = read_groups(tmp_path / "person" / "ranking")
    assert [group.rewards for group in ranked] == [group.raters["script"] for group in ranked]
    assert all(sorted(group.rewards) == [0, 0, 1, 1] for group in ranked)


def test_a_run_that_is_stopped_asks_nobody_twice(tmp_path):
    port = free_port()
    with Rater(port, leave=after(3)) as one, pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", port).train()
    assert len(one.answers) == 3, "the second iteration is half ranked"
    assert len(read_groups(tmp_path / "run" / "ranking")) == 3
    with Rater(port) as two:
        run(tmp_path / "run", port, resume=True).train()
    assert len(two.answers) == 1 and not set(one.answers) & set(two.answers)
    trainer(tmp_path / "whole", reward=human).train()
    assert without_times(tmp_path / "run") == without_times(tmp_path / "whole")


def test_pictures_ahead_are_shown_before_the_first_are_ranked(tmp_path):
    port = free_port()
    with Rater(port, first=4) as rater:
        run(tmp_path / "ahead", port, rollout={"ahead": 1}).train()
    assert len(rater.answers) == 4
    # they are drawn by the weights of the moment: those of a policy that does not move
    trainer(tmp_path / "still", reward=keep(tmp_path / "still"), train={"lr": 1e-12}).train()
    assert groups(tmp_path / "ahead") == groups(tmp_path / "still")
    trainer(tmp_path / "moves", reward=keep(tmp_path / "moves")).train()
    assert groups(tmp_path / "ahead")[:2] == groups(tmp_path / "moves")[:2]
    assert groups(tmp_path / "ahead")[2:] != groups(tmp_path / "moves")[2:]


def test_pictures_ahead_outlive_a_stop(tmp_path):
    port, ahead = free_port(), {"rollout": {"ahead": 1}}
    with Rater(port, first=4, leave=after(3)) as one, pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", port, **ahead).train()
    assert len(one.answers) == 3, (
        "the second iteration, drawn before the first update, is half ranked"
    )
    with Rater(port) as two:
        run(tmp_path / "run", port, resume=True, **ahead).train()
    assert len(two.answers) == 1 and not set(one.answers) & set(two.answers)
    trainer(tmp_path / "whole", reward=human, **ahead).train()
    assert without_times(tmp_path / "run") == without_times(tmp_path / "whole")


def keep(folder):
    """The scripted person as a function that keeps the groups, but for the trial's."""
    calls = iter(range(100))

    def score(images, prompts):
        if next(calls):
            Store(folder / "ranking").add(prompts[0], images)
        return human(images, prompts)

    score.group_wise = True
    return score


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"options": {"ask": "dates"}}, "likes, order, stars"),
        ({"options": {"raters": 0}}, "1 or more people"),
        ({"options": {"colour": "red"}}, "colour"),
        ({"rank": True}, "leave it out"),
    ],
)
def test_what_a_recipe_may_not_say(reward, message):
    with pytest.raises(UserError, match=message):
        load_rewards({"human": reward})


def test_a_group_of_which_nobody_has_an_opinion_is_left_out(tmp_path):
    """It is no zero, beside another reward neither."""
    from PIL import Image

    from dgpo.ranking.answers import Likes, Skip

    options = {"folder": str(tmp_path), "port": 0}
    rewards = load_rewards({"redness": 1.0, "human": {"options": options, "retries": 3}})
    images = [Image.new("RGB", (4, 4), (40 * shade, 0, 0)) for shade in range(6)]
    store = Store(tmp_path)
    for first, answer in ((0, Skip()), (3, Likes(liked=[2]))):
        store.answer(store.add("a cat", images[first : first + 3]), "ann", answer)
    store.close()
    try:
        scored = rewards.score(images, _prompts() * 6, [0] * 3 + [1] * 3)
    finally:
        rewards.close()
    assert list(scored.lost) == [0] and "nobody has an opinion of 'a cat'" in scored.lost[0]
    assert scored.by_name["human"][3:].tolist() == [0.0, 0.0, 1.0]
    assert scored.by_name["human"][:3].isnan().all()


def test_what_is_refused_before_a_run(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"options.host 0\.0\.0\.0.*give rewards.human.options"):
        load_rewards({"human": {"options": {"host": "0.0.0.0"}}}).check([*_prompts()])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        load_rewards({"human": 1.0}).check([*_prompts()])
    for changes, message in (
        ({"algorithm": {"name": "flow_grpo"}, "rollout": {"ahead": 1}}, "own steps; use 0"),
    ):
        given = {**settings(**changes), **({"algorithm": changes.get("algorithm", "dgpo")})}
        with pytest.raises(UserError, match=message):
            Recipe.from_dict(given)


def test_held_out_pictures_are_no_group_to_rank(tmp_path):
    port = free_port()
    with pytest.raises(UserError, match=r"in\s+none: name others in eval.metrics"):
        run(tmp_path / "run", port, eval_dataset=["a photo of cat"]).train()


def _prompts():
    from dgpo.prompts import Prompt

    return [Prompt("a cat")]
