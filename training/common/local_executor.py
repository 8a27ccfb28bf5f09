"""datatrove's local executor on processes whose death is noticed."""

from __future__ import annotations

from datatrove.executor import LocalPipelineExecutor

from training.common.workers import run_in_workers


class LocalExecutor(LocalPipelineExecutor):
    """Runs tasks in local processes.

    datatrove's own pool starts another process for one that the system killed, and waits for its task for ever. Nothing
    else differs: the same tasks, logs and notes of what is done.
    """

    def run(self) -> None:
        """Runs the tasks that are left.

        Raises:
            StoppedError: If the system killed a process. Whatever else a task raises arrives as it is.
        """
        self.save_executor_as_json()
        ranks = [(rank, number % self.workers) for number, rank in enumerate(self.get_incomplete_ranks())]
        for _ in run_in_workers(self._run_for_rank, ranks, self.workers, self.start_method):
            pass
