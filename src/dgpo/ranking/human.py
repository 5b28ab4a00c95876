"""A reward that people give: a web page shows each group, and training waits for what they say.

Licence: own. Range 0 to 1, higher is better; docs/ranking.md.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from dgpo.errors import UserError
from dgpo.ranking.answers import KINDS, Kind
from dgpo.ranking.server import PORT, PageServer
from dgpo.rewards.call_limits import RewardFailure

if TYPE_CHECKING:
    from dgpo.ranking.desk import Desk
    from dgpo.ranking.store import Group

_NAMES = tuple(f"rewards.human.options.{key}" for key in ("host", "port", "token_file"))


class HumanReward:
    """Asks people which pictures of a group they prefer.

    A group that was ranked before, the same prompt and the same pixels, is not asked about again:
    a run that is stopped goes on with the groups that are left.

    Args:
        folder: where rankings are kept; null: ``ranking`` in the run folder.
        ask: ``likes``, ``order`` or ``stars``, at first; people may choose another on the page.
        raters: different people that are wanted for each group; rewards are their mean.
        host: 127.0.0.1 for this machine alone; others want a token.
        port: of the page; 0 for any that is free.
        token_file: a file with what raters must know.

    Raises:
        UserError: an option that cannot be.
    """

    __name__ = "human"
    group_wise = True
    asks_people = True

    def __init__(
        self,
        folder: str | None = None,
        ask: Kind = "likes",
        raters: int = 1,
        host: str = "127.0.0.1",
        port: int = PORT,
        token_file: str | None = None,
    ) -> None:
        if ask not in KINDS:
            raise UserError(f"rewards.human.options.ask = {ask!r}: one of {', '.join(KINDS)}")
        if not isinstance(raters, int) or raters < 1:
            raise UserError(f"rewards.human.options.raters = {raters!r}: 1 or more people")
        self._folder = None if folder is None else Path(folder)
        self._ask: Kind = ask
        self._raters = raters
        self._listens: tuple[Any, ...] = (host, port, token_file)
        self._page: PageServer | None = None
        self._desk: Desk | None = None

    def check(self, prompts: Sequence[Any]) -> None:
        """Take the port, so that it is not found taken when the first pictures are there.

        Raises:
            UserError: as :class:`PageServer`, or the run has several processes.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                "reward 'human': each process would have a page of its own; train in one process"
            )
        if self._page is None:
            self._page = PageServer(*self._listens, names=_NAMES)  # pyright: ignore

    def run_in(self, folder: Path) -> None:
        """The run's folder, where rankings go if no other folder is set."""
        if self._folder is None:
            self._folder = folder / "ranking"

    def announce(
        self, images: Sequence[Image.Image], prompts: Sequence[str], **columns: Sequence[Any]
    ) -> None:
        """Show a group to people before it is asked about.

        Raises:
            UserError: it cannot be kept or shown.
        """
        self._post(images, prompts, columns)

    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], **columns: Sequence[Any]
    ) -> list[float]:
        """The rewards of a group, [0, 1] each, as soon as enough people have ranked it.

        Raises:
            RewardFailure: nobody has an opinion; the run goes on without the group.
            UserError: it cannot be kept or shown.
        """
        group = self._post(images, prompts, columns)
        assert self._desk is not None
        rewards = self._desk.rewards(group)
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

    def _post(self, images: Any, prompts: Any, columns: Any) -> Group:
        row = {key: column[0] for key, column in columns.items()}
        return self._opened().post(str(prompts[0]), images, row)

    def _opened(self) -> Desk:
        """The desk; the page is there from the first group on."""
        if self._desk is None:
            from dgpo.ranking.desk import Desk
            from dgpo.ranking.store import Store

            self.check(())
            assert self._page is not None
            folder = self._folder or Path("ranking")
            self._desk = Desk(Store(folder), self._raters)
            self._page.start(self._desk, self._ask)
            print(f"{self._page.invitation}; kept in {folder}", flush=True)
        return self._desk
