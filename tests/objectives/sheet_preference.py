"""Worked examples of preference losses and of losses over candidates, by hand, named by their entries.

Pairs (D): chosen logprobs [-1, -0.5], reference [-1.2, -0.9]; rejected [-2, -1, -1.5], reference [-1.5, -1, -1.4]; beta
0.5 unless the entry has another. The loss is a mean over pairs.

Candidates (E): probabilities of three candidates, [0.5, 0.2, 0.1] of the student and [0.6, 0.2, 0.1] of the teacher.
"""

PAIR = {
    "lengths": (2, 3),
    "logprobs": [-1.0, -0.5, -2.0, -1.0, -1.5],
    "reference": [-1.2, -0.9, -1.5, -1.0, -1.4],
}
# D9: the chosen answer is less likely than under the reference.
PAIR_BELOW = {**PAIR, "logprobs": [-1.4, -0.9, -2.0, -1.0, -1.5]}

STUDENT = [0.5, 0.2, 0.1]
TEACHER = [0.6, 0.2, 0.1]

# Losses on pairs: value, gradient.
PAIRS = {
    "D1": (0.437488, [-0.177172, -0.177172, 0.177172, 0.177172, 0.177172]),
    "D1 smoothed": (0.497488, [-0.127172, -0.127172, 0.127172, 0.127172, 0.127172]),
    "D1 robust": (0.362488, [-0.239672, -0.239672, 0.239672, 0.239672, 0.239672]),
    "D2": (0.25, [-0.5, -0.5, 0.333333, 0.333333, 0.333333]),
    "D2 sums": (0.04, [0.4, 0.4, -0.4, -0.4, -0.4]),
    "D3": (0.4, [-0.5, -0.5, 0.5, 0.5, 0.5]),
    "D3 slic": (1.0, [-1.0, -1.0, 1.0, 1.0, 1.0]),
    "D4": (0.425739, [-0.061879, -0.061879, 0.060065, 0.060065, 0.060065]),
    "D5": (0.313262, [-0.268941, -0.268941, 0.179294, 0.179294, 0.179294]),
    "D6": (0.777825, [-0.523017, -0.523017, 0.010422, 0.010422, 0.010422]),
    "D7": (1.304355, [-0.542556, -0.542556, 0.042556, 0.042556, 0.042556]),
    "D9": (0.854355, [-1.723328, -1.723328, 0.287221, 0.287221, 0.287221]),
}
# D8: DPO, and the NLL of the chosen answer as a regularizer with weight 0.2.
DPO_AND_NLL = (0.587488, [-0.277172, -0.277172, 0.177172, 0.177172, 0.177172])
KTO_LOSSES = [0.450166, 0.401312]
CHOSEN_SCORE, REJECTED_SCORE, MARGIN = 0.6, -0.6, 0.6
LOG_ODDS = 1.136871

# Losses over candidates: value, gradient in the logprobs of the student.
CANDIDATES = {
    "E1 raw": (0.109393, [-0.6, -0.2, -0.1]),
    "E1 tail": (0.040078, [-0.35, -0.1, -0.05]),
    "E1 renormalized": (0.003765, [-0.041667, 0.027778, 0.013889]),
    "E2 tail": (0.047469, [-0.437734, -0.138629, -0.069315]),
    "E2 renormalized": (0.003832, [-0.042732, 0.028488, 0.014244]),
    "E3 half": (0.010771, [-0.095748, -0.028768, -0.014384]),
    "E3 tenth": (0.003654, [-0.031993, -0.009233, -0.004616]),
    "E4": (0.470004, [-0.375, 0.25, 0.125]),
    "E4 smoothed": (0.722576, [-0.175, 0.15, 0.025]),
    "E5": (0.21875, [-0.273438, 0.203125, 0.070313]),
}
# E3: JSD(b) / b as b goes to 0, which is the forward KL with the tail.
JSD_LIMIT = 0.040075

# E6: advantages from a teacher, and importance sampling with them.
ON_POLICY = {"logprobs": [-1.1, -1.8], "sampler": [-1.0, -2.0], "teacher": [-0.5, -2.5]}
TEACHER_ADVANTAGES = [0.5, -0.5]
DISCOUNTED_ADVANTAGES = [0.25, -0.5]
ON_POLICY_LOSS = (0.158283, [-0.452419, 0.610701])
