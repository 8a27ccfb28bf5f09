"""Small programs that show how a trained model is used."""
