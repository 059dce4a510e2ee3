"""The objective in float64 numpy and scipy, written from the formulas, without askd_hf."""

import numpy as np
from scipy.special import log_softmax, rel_entr, softmax

# by name: the divergence of arrays of probabilities, computed without askd_hf; m is mix * p + (1 - mix) * q
REFERENCES = {
    "forward_kl": lambda p, q, m, mix: rel_entr(p, q).sum(-1),
    "reverse_kl": lambda p, q, m, mix: rel_entr(q, p).sum(-1),
    "jensen_shannon": lambda p, q, m, mix: mix * rel_entr(p, m).sum(-1) + (1 - mix) * rel_entr(q, m).sum(-1),
    "skewed_kl": lambda p, q, m, mix: rel_entr(p, m).sum(-1),
}


def numpy_divergence(name, p, q, mix):
    assert name in REFERENCES, f"add the reference of {name} to REFERENCES"
    return REFERENCES[name](p, q, mix * p + (1 - mix) * q, mix)


def numpy_blend(
    student, labels, teacher, self_, a, b, temperature, name, mix, weight_teacher_by_label_prob, trusted=1.0
):
    rows = np.arange(len(labels))
    ce = -log_softmax(student, axis=-1)[rows, labels]
    g = trusted * (softmax(teacher, axis=-1)[rows, labels] if weight_teacher_by_label_prob else 1.0)
    q = softmax(student / temperature, axis=-1)
    d_teacher = temperature**2 * numpy_divergence(name, softmax(teacher / temperature, axis=-1), q, mix)
    d_self = temperature**2 * numpy_divergence(name, softmax(self_ / temperature, axis=-1), q, mix)
    return (1 - a * g - b) * ce + a * g * d_teacher + b * d_self
