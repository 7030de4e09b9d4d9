"""A student for several numbers of steps, to be put in the place of a run's method."""

from lightning_modules import DenoisingStudent
from stillhouse.diffusion.sampling import Sampling


class FewSteps(DenoisingStudent):
    """One network for 1, 2 and 3 steps of Euler; another, which differs from it a little, for 4."""

    moved = 0.0

    def sampling(self, nfe=None):
        sigmas = self.teacher.sigmas(nfe or 1)
        return Sampling(sigmas.tolist(), self.student.preconditioning.prior_std(sigmas[0]).item())

    def choose_steps(self, nfe, folder):
        if nfe > 4:
            raise ValueError(f"steps={nfe}: the students of {folder} take 1, 2, 3 or 4")
        self.chosen_nfe = nfe
        shift = 0.01 if nfe == 4 else 0.0
        for parameter in self.student.parameters():
            parameter.data.add_(shift - self.moved)
        self.moved = shift
        return "of_four" if shift else "of_few"
