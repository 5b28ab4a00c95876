"""A reward that people give: a web page shows each group, and training waits for what they say.

Licence: own. Range 0 to 1, higher is better; docs/ranking.md.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgpo.errors import UserError
from dgpo.ranking.answers import KINDS, Kind
from dgpo.ranking.server import PORT, PageServer
from dgpo.rewards.reward import Media, Reward, RewardFailure, Texts

if TYPE_CHECKING:
    from dgpo.ranking.desk import Desk
    from dgpo.ranking.store import Group

_OPTION = "rewards.human.options."


@dataclass(eq=False)
class HumanReward(Reward):
    """Asks people which pictures of a group they prefer.

    A group that was ranked before, the same prompt and the same pixels, is not asked about again:
    a run that is stopped goes on with the groups that are left.

    Raises:
        UserError: an option cannot be used.
    """

    name = "human"
    group_wise = True
    asks_people = True

    folder: str | Path | None = None
    """The folder in which rankings are kept; null: ``ranking`` in the run folder."""
    ask: Kind = "likes"
    """How people are asked first: ``likes``, ``order`` or ``stars``; they may choose another on the
    page."""
    raters: int = 1
    """How many different people rank each group; rewards are their mean."""
    host: str = "127.0.0.1"
    """The address of the page: 127.0.0.1 for this machine alone; others want a token."""
    port: int = PORT
    """The port of the page; 0 for any that is free."""
    token_file: str | None = None
    """A file with what raters must know."""

    def __post_init__(self) -> None:
        if self.ask not in KINDS:
            raise UserError(f"{_OPTION}ask = {self.ask!r}: one of {', '.join(KINDS)}")
        if not isinstance(self.raters, int) or self.raters < 1:
            raise UserError(f"{_OPTION}raters = {self.raters!r}: 1 or more people")
        self._page: PageServer | None = None
        self._desk: Desk | None = None

    def check(self, prompts: Sequence[Any]) -> None:
        """Take the port, so that it is not found taken when the first pictures are there.

        Raises:
            UserError: see :class:`PageServer`, or the run has several processes.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                "reward 'human': each process would have a page of its own; train in one process"
            )
        if self._page is None:
            names = (f"{_OPTION}host", f"{_OPTION}port", f"{_OPTION}token_file")
            self._page = PageServer(self.host, self.port, self.token_file, names)

    def run_in(self, folder: Path) -> None:
        """Keep rankings in the run's folder if no other folder is set."""
        if self.folder is None:
            self.folder = folder / "ranking"

    def announce(self, images: Media, prompts: Texts, **columns: Any) -> None:
        """Show a group to people before it is asked about.

        Raises:
            UserError: the group cannot be kept or shown.
        """
        self._post(images, prompts, columns)

    def __call__(self, images: Media, prompts: Texts, **columns: Any) -> list[float]:
        """The rewards of a group, [0, 1] each, as soon as enough people have ranked it.

        Raises:
            RewardFailure: nobody has an opinion; the run goes on without the group.
            UserError: the group cannot be kept or shown.
        """
        desk, group = self._post(images, prompts, columns)
        rewards = desk.rewards(group)
        if rewards is None:
            text = f"reward 'human': nobody has an opinion of {prompts[0]!r:.80}"
            raise RewardFailure(text, skips=True)
        return rewards

    def close(self) -> None:
        """Take the page away, and write the dataset of all that was ranked."""
        if self._page is not None:
            self._page.stop()
        if self._desk is not None:
            from dgpo.ranking.dataset import export

            export(self._desk.store)
            self._desk.store.close()
        self._page = self._desk = None

    def _post(self, images: Any, prompts: Any, columns: Any) -> tuple[Desk, Group]:
        row = {key: column[0] for key, column in columns.items()}
        desk = self._opened()
        return desk, desk.post(str(prompts[0]), images, row)

    def _opened(self) -> Desk:
        """The desk; the page is there from the first group on."""
        if self._desk is None:
            from dgpo.ranking.desk import Desk
            from dgpo.ranking.store import Store

            self.check(())
            assert self._page is not None
            folder = Path(self.folder or "ranking")
            self._desk = Desk(Store(folder), self.raters)
            self._page.start(self._desk, self.ask)
            print(f"{self._page.invitation}; kept in {folder}", flush=True)
        return self._desk
