"""FX passes: normalize, find, swap, lower. README.md beside this file has the invariants of each."""
