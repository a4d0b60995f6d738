"""The rows of the cookbook's table. This file needs nothing but the standard library, as `flows.py`."""

RECIPES = {
    "recipes.sl_basic": "sl_basic",
    "recipes.sl_basic, the same weights": "same_weights",
    "recipes.chat_sl, with resume": "chat_sl",
    "recipes.sl_loop": "sl_loop",
    "recipes.prompt_distillation": "prompt_distillation",
    "recipes.distillation.off_policy_reasoning": "off_policy_reasoning",
    "recipes.preference.dpo": "dpo",
    "recipes.math_rl, importance_sampling": "math_rl",
    "recipes.math_rl, ppo": "math_rl_ppo",
    "recipes.math_rl, cispo": "math_rl_cispo",
    "recipes.math_rl, asynchronous": "math_rl_async",
    "recipes.math_rl, streaming": "math_rl_stream",
    "rl.train, KL penalty and substeps": "kl_penalty",
    "rl.train, an easy reward is learned": "easy_reward",
    "recipes.rl_basic": "rl_basic",
    "recipes.rl_loop": "rl_loop",
    "recipes.distillation.on_policy_distillation": "on_policy_distillation",
    "recipes.distillation.on_policy_multi_teacher": "multi_teacher",
    "recipes.sdft": "sdft",
    "recipes.preference.shorter": "shorter",
    "recipes.preference.rlhf": "rlhf",
    "recipes.multiplayer_rl.guess_number": "guess_number",
    "recipes.multiplayer_rl.twenty_questions": "twenty_questions",
    "weights.download of a training checkpoint": "download",
}
"""Recipe of tinker-cookbook, and the method of `Recipes` in `cookbook_program.py` that runs it."""
