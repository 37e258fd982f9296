"""Values of the options of `timm-spikformer profile`. This file imports nothing, so that --help is fast."""

# For each option of `Conventions`, its values and their meaning; the first value is the default, as in the papers
CHOICES = {
    'residual': {
        'sum': 'an input that is the sum of n spikes costs n accumulates per weight',
        'nonzero': 'any nonzero sum of spikes costs one accumulate per weight',
        'mac': 'layers with sums of spikes as input perform all dense multiply-accumulates',
    },
    'fan_out': {
        'dense': 'the number of operations is the mean input times the dense operations, including zero padding',
        'exact': 'each input counts once per weight that it is multiplied by, which are fewer at image borders',
    },
    'first_conv': {
        'once': 'the first convolution of an image costs the multiply-accumulates of one time step',
        'each_step': 'the first convolution of an image costs the multiply-accumulates of all time steps',
        'ac': 'the first convolution of an image costs accumulates at all time steps',
    },
    'attention': {
        'rate': 'each of the two products costs the firing rate of one operand times its dense operations',
        'coincidence': 'the first product costs one accumulate for each pair of spikes that coincide',
        'none': 'the two products are not counted',
    },
    'attention_order': {
        'qk': '(q k^T) v, quadratic in the number of tokens',
        'cheaper': 'the cheaper of (q k^T) v and q (k^T v), as computed by this package',
    },
    'bn': {
        'folded': 'BN is folded into the weights and costs nothing',
        'mac': 'BN costs one multiply-accumulate per value',
    },
    'neuron': {
        'free': 'membrane updates cost nothing',
        'mac': 'each membrane update costs one multiply-accumulate',
    },
}

COST_NAMES = ('fp32', 'fp32-memory', 'fp16', 'int8', 'int32')  # keys of COST_MODELS in conventions.py
