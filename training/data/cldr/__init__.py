"""Names from Unicode CLDR as training data: the offline default."""
