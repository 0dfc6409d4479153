"""FX passes: normalize (to one spelling), find (the attention sites), swap (softmax to sigmoid)."""
