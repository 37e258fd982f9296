"""Facts about the supported datasets: sensor size, classes, splits, download page and citation."""
from typing import Dict, NamedTuple, Optional, Tuple

__all__ = ['DATASETS', 'DatasetInfo']


class DatasetInfo(NamedTuple):
    """Facts about a dataset.

    Args:
        title: Name in the literature.
        size: Height and width of the sensor, in pixels.
        classes: Class names in the order of the labels; None if they are the names of the class folders.
        num_recordings: Number of recordings, all splits together.
        splits: Names of the ways to split the dataset into train and test, default first; see `read_recordings`.
        homepage: Download page.
        archives: Names of the archives to download and unpack.
        layout: Example paths of files in the unpacked archives, for messages.
        citation: Paper that introduces the dataset.
    """
    title: str
    size: Tuple[int, int]
    classes: Optional[Tuple[str, ...]]
    num_recordings: int
    splits: Tuple[str, ...]
    homepage: str
    archives: Tuple[str, ...]
    layout: str
    citation: str

    @property
    def source(self) -> str:
        """A sentence for messages that says where to download the dataset."""
        return f'Download {", ".join(self.archives)} of {self.title} from {self.homepage} and unpack them.'


_CIFAR10_CLASSES = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
_ORCHARD_2015 = (
    'G. Orchard, A. Jayawant, G. K. Cohen and N. Thakor, "Converting Static Image Datasets to Spiking Neuromorphic '
    'Datasets Using Saccades", Frontiers in Neuroscience 9, 2015, https://doi.org/10.3389/fnins.2015.00437')

DATASETS: Dict[str, DatasetInfo] = {
    'cifar10_dvs': DatasetInfo(
        title='CIFAR10-DVS',
        size=(128, 128),
        classes=_CIFAR10_CLASSES,
        num_recordings=10000,
        splits=('first-90', 'tebn'),
        homepage='https://figshare.com/articles/dataset/CIFAR10-DVS_New/4724671',
        archives=tuple(f'{name}.zip' for name in _CIFAR10_CLASSES),
        layout='airplane/cifar10_airplane_0.aedat',
        citation='H. Li, H. Liu, X. Ji, G. Li and L. Shi, "CIFAR10-DVS: An Event-Stream Dataset for Object '
                 'Classification", Frontiers in Neuroscience 11, 2017, https://doi.org/10.3389/fnins.2017.00309',
    ),
    'dvs128_gesture': DatasetInfo(
        title='DVS128 Gesture',
        size=(128, 128),
        classes=(
            'hand_clapping', 'right_hand_wave', 'left_hand_wave', 'right_arm_clockwise', 'right_arm_counter_clockwise',
            'left_arm_clockwise', 'left_arm_counter_clockwise', 'arm_roll', 'air_drums', 'air_guitar',
            'other_gestures'),
        num_recordings=1464,  # gestures in the label files; the paper states 1342
        splits=('official',),
        homepage='https://ibm.ent.box.com/s/3hiq58ww1pbbjrinh367ykfdf60xsfm8/folder/50167556794',
        archives=('DvsGesture.tar.gz',),
        layout='DvsGesture/trials_to_train.txt, user01_fluorescent.aedat and user01_fluorescent_labels.csv',
        citation='A. Amir et al., "A Low Power, Fully Event-Based Gesture Recognition System", CVPR 2017, '
                 'https://doi.org/10.1109/CVPR.2017.781',
    ),
    'n_mnist': DatasetInfo(
        title='N-MNIST',
        size=(34, 34),
        classes=tuple('0123456789'),
        num_recordings=70000,
        splits=('official',),
        homepage='https://www.garrickorchard.com/datasets/n-mnist',
        archives=('Train.zip', 'Test.zip'),
        layout='Train/0/00002.bin and Test/0/00004.bin',
        citation=_ORCHARD_2015,
    ),
    'n_caltech101': DatasetInfo(
        title='N-Caltech101',
        size=(180, 240),
        classes=None,
        num_recordings=8709,
        splits=('first-90',),
        homepage='https://www.garrickorchard.com/datasets/n-caltech101',
        archives=('Caltech101.zip',),
        layout='Caltech101/accordion/image_0001.bin',
        citation=_ORCHARD_2015,
    ),
}
