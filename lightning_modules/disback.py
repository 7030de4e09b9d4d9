"""DisBack: distribution backtracking (Zhang et al., arXiv 2408.15991) on Diff-Instruct."""

from lightning_modules.diff_instruct import DiffInstruct


class DisBack(DiffInstruct):
    """Diff-Instruct that follows the teacher's degradation path backwards, as `Backtracking` says, whose options it is about.

    With `nodes` = 0 it is Diff-Instruct, bit for bit.
    """
