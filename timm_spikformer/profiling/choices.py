"""Values of the options of `timm-spikformer profile`. This file imports nothing, so that --help is quick."""

# For each option of `Conventions`, the values and their meaning; the first one is the default, and the papers'
CHOICES = {
    'residual': {
        'sum': 'a sum of n spikes causes n accumulates for each weight',
        'nonzero': 'a sum of spikes causes one accumulate for each weight, whatever its value',
        'mac': 'layers that read sums of spikes do all of their multiply-accumulates',
    },
    'fan_out': {
        'dense': 'an input causes its mean rate times the dense operations, zero padding included',
        'exact': 'each input is counted with the weights that it meets, which are fewer at the border',
    },
    'first_conv': {
        'once': 'the convolution of an image is done once, in multiply-accumulates',
        'each_step': 'it is done at each time step, in multiply-accumulates',
        'ac': 'it is done at each time step, in accumulates',
    },
    'attention': {
        'rate': 'each of the two products costs the rate of its spiking operand times its dense operations',
        'coincidence': 'the product of two spiking operands costs one accumulate where both of them fire',
        'none': 'the two products are left out',
    },
    'attention_order': {
        'qk': '(q k^T) v, quadratic in the number of tokens',
        'cheaper': 'the cheaper of (q k^T) v and q (k^T v), which is what this package computes',
    },
    'bn': {
        'folded': 'BN is folded into the weights, and free',
        'mac': 'BN costs a multiply-accumulate for each value',
    },
    'neuron': {
        'free': 'updates of membranes are free',
        'mac': 'each update of a membrane costs a multiply-accumulate',
    },
}

COST_NAMES = ('fp32', 'fp32-memory', 'fp16', 'int8', 'int32')  # of the cost models in conventions.py
