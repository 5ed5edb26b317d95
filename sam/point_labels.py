"""Point labels of SAM's prompt encoder, as in segment_anything's ONNX export."""

NOT_A_POINT = -1
BACKGROUND_POINT = 0
FOREGROUND_POINT = 1
BOX_CORNERS = BOX_CORNER_1, BOX_CORNER_2 = 2, 3
# Ours: fills up the prompts of a batch to one length and is masked out of every attention.
ABSENT = -2
