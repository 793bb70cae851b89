"""Search spaces: functions that return {setting: distribution}, for `python -m tune.sweep`."""

from ray import tune

Space = dict[str, tune.search.sample.Domain]


def optimiser() -> Space:
    """How fast to learn. For any stage but `distil`."""
    return {
        "optim.lr": tune.loguniform(3e-4, 1e-2),
        "optim.warmup": tune.uniform(0.02, 0.3),
        "optim.weight_decay": tune.loguniform(1e-3, 1e-1),
    }


def network() -> Space:
    """How large the teacher should be. For any stage but `distil`."""
    return {
        "optim.lr": tune.loguniform(3e-4, 1e-2),
        "network.width": tune.choice([32, 64, 128]),
        "network.layers": tune.choice([1, 2, 3]),
        "network.fusion_layers": tune.choice([1, 2]),
    }


def masking() -> Space:
    """What stage 1 should practise, judged by how well stage 2 goes from there."""
    return {
        "optim.lr": tune.loguniform(3e-4, 1e-2),
        "unimodal.mask": tune.choice([(0.05, 0.15), (0.15, 0.4), (0.3, 0.6)]),
        "unimodal.zeros": tune.choice([0.1, 0.25, 0.5]),
    }


def student() -> Space:
    """How large the student should be. For `sweep.stage=distil`."""
    return {
        "student.hidden": tune.choice([128, 256, 512]),
        "student.blocks": tune.choice([1, 2, 4]),
    }
