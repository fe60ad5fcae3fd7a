"""The geometry of a model's layers: second moments of what they see, and the coordinates that even them out."""

from dp_rmt.geometry.layer_moments import LayerMoments as LayerMoments
from dp_rmt.geometry.layer_moments import layer_moments as layer_moments
from dp_rmt.geometry.whitening import coordinates_of as coordinates_of
from dp_rmt.geometry.whitening import top_shares as top_shares
from dp_rmt.geometry.whitening import whiten_inputs as whiten_inputs
from dp_rmt.geometry.whitening import whitened_coordinates as whitened_coordinates
