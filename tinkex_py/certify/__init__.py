"""Measures the map from the gradient that a custom step sends to the change of the logprobs that follows.

To first order a step of a model along a gradient g of the logprobs changes them by `-c * K g`, where `K = J J^T` is
symmetric and positive, and J is the Jacobian of the logprobs. So a surrogate that carries g unchanged has a response
that is linear in g, symmetric, and descending, and that does not depend on what else is in a request. A surrogate whose
service scales, cuts or drops parts of g has another one. A constant factor is the only change that this cannot show.

`models` creates the throwaway models, `probes` makes single measurements, `checks` compares them, and `measurement`
makes a certificate of the comparisons.
"""
