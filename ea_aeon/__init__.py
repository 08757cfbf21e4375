"""The EA-DC-Transformer for aeon and scikit-learn: time series classification and regression."""

from ea_aeon.estimators import EADCTransformerClassifier, EADCTransformerRegressor

__all__ = ["EADCTransformerClassifier", "EADCTransformerRegressor"]
