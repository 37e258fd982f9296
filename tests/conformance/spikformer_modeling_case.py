"""Test cases for transformers' tests/test_modeling_common.py; run by test_transformers.py."""
import unittest

import torch
from tests.test_modeling_common import ModelTesterMixin, floats_tensor
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from timm_spikformer import (
    SpikformerConfig,
    SpikformerForImageClassification,
    SpikformerForMaskedImageModeling,
    SpikformerModel,
)

# transformers' tests choose inputs and test cases by these tables of class names
MODEL_MAPPING_NAMES['spikformer'] = 'SpikformerModel'
MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES['spikformer'] = 'SpikformerForImageClassification'
MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING_NAMES['spikformer'] = 'SpikformerForMaskedImageModeling'


class SpikformerModelTester:
    batch_size = 4
    image_size = 32
    patch_size = 8
    num_patches = (image_size // patch_size) ** 2
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 2
    num_labels = 3
    is_training = True

    def __init__(self, parent, seq_length):
        self.parent = parent
        self.seq_length = seq_length

    def get_config(self):
        return SpikformerConfig(
            image_size=self.image_size, patch_size=self.patch_size, hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers, num_attention_heads=self.num_attention_heads, time_steps=2,
            num_labels=self.num_labels, decoder_hidden_size=32, decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2)

    def prepare_config_and_inputs_for_common(self):
        x = floats_tensor([self.batch_size, 3, self.image_size, self.image_size])
        return self.get_config(), {'pixel_values': x}


class SpikformerModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (SpikformerModel, SpikformerForImageClassification)
    seq_length = SpikformerModelTester.num_patches
    test_resize_embeddings = False
    has_attentions = False

    def setUp(self):
        self.model_tester = SpikformerModelTester(self, self.seq_length)

    def test_model_get_set_embeddings(self):
        """Override the test, as other image models do, because there is no nn.Embedding."""
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            self.assertIsInstance(model_class(config).get_input_embeddings(), torch.nn.Module)


class SpikformerForMaskedImageModelingTest(SpikformerModelTest):
    """Tests with masked images; hidden states contain the visible quarter of the patches."""
    all_model_classes = (SpikformerForMaskedImageModeling,)
    seq_length = SpikformerModelTester.num_patches // 4

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs_dict = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        # the same mask in each call
        mask = torch.arange(self.model_tester.num_patches) % 4 > 0
        inputs_dict['bool_masked_pos'] = mask.expand(len(inputs_dict['pixel_values']), -1)
        return inputs_dict
