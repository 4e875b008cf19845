"""How good the instruments are: the cards of the canvas, and the error rates of judges."""
