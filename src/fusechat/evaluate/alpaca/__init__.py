"""AlpacaEval 2.0: 805 instructions, each answer compared by a judge model with that of a baseline (Dubois et al.,
Length-Controlled AlpacaEval, 2024). The alpaca_eval library computes; our client asks the judge."""
