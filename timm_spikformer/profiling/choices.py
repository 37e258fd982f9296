"""Values of the options of `timm-spikformer profile`. This file imports nothing, so that --help is fast."""

# For each option of `Conventions`, its values and their meaning; the first value is the default, as in the papers
CHOICES = {
    'residual': {
        'sum': 'an input that is the sum of n spikes costs n accumulates per weight',
        'nonzero': 'any nonzero sum of spikes costs one accumulate per weight',
        'mac': 'layers with sums of spikes as input do all dense multiply-accumulates',
    },
    'fan_out': {
        'dense': 'operations are the mean input times the dense operations, including zero padding',
        'exact': 'each input counts once per weight that it is multiplied by; there are fewer at image borders',
    },
    'first_conv': {
        'once': 'the first convolution of an image runs once, in multiply-accumulates',
        'each_step': 'it runs at each time step, in multiply-accumulates',
        'ac': 'it runs at each time step, in accumulates',
    },
    'attention': {
        'rate': 'each of the two products costs the firing rate of one spiking operand times its dense operations',
        'coincidence': 'the product of two spiking operands costs one accumulate for each pair in which both fire',
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

COST_NAMES = ('fp32', 'fp32-memory', 'fp16', 'int8', 'int32')  # names of the cost models in conventions.py
