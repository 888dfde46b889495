"""A session whose guarded model answers a share of the images that grows in stages.

staged = Staged(session, file="state.safetensors.rollout.json")
if news := staged.after(answers, gain=review.gain):  # after each batch
    print(news)
staged.save()  # another run goes on with the stage
"""

from collections.abc import Sequence
from pathlib import Path

from jaxtta.deploy.answers import Answer
from jaxtta.deploy.rollout import Plan, Rollout, after_step, chosen
from jaxtta.deploy.session import Session
from jaxtta.io import read_json, write_json


class Staged:
    """The roll-out of a session; see `jaxtta.deploy.rollout`."""

    def __init__(
        self,
        session: Session,
        plan: Plan = Plan(),  # noqa: B008  immutable
        file: str | Path | None = None,
    ) -> None:
        """Begin, or go on with the stage in the file.

        Args:
            session: with a guard.
            plan: the stages.
            file: where the stage is kept; None for nowhere.

        Raises:
            ValueError: if the file holds no stage of the plan.
        """
        self._plan, self._file, self._now = plan, Path(file) if file else None, Rollout()
        if self._file and self._file.exists():
            content = read_json(self._file)
            try:
                self._now = Rollout(**content)
                range(len(plan.shares)).index(self._now.stage)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{file}: holds no stage of this roll-out") from error
        session.served = lambda name: chosen(name, self._now.share(plan))

    def after(self, answers: Sequence[Answer], gain: tuple[float, float] | None) -> str | None:
        """Take a batch's answers into account.

        Args:
            answers: of the batch.
            gain: bounds of the gain in accuracy that labels show; None without labels.

        Returns:
            A sentence, where the share changes.
        """
        before, decision = self._now, str(answers[0].decision)
        self._now = after_step(
            before, self._plan, images=len(answers), decision=decision, gain=gain
        )
        if (share := self._now.share(self._plan)) == before.share(self._plan):
            return None
        why = f": {self._now.returned}" if self._now.returned else ""
        return f"the guarded model answers {share:.0%} of the images{why}"

    def save(self) -> None:
        """Keep the stage."""
        if self._file:
            write_json(self._file, self._now._asdict())
