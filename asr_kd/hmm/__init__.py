"""HMM-state targets: topology, Gaussian mixtures, batched Viterbi, state tying, flat start, alignment."""
