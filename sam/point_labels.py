"""Labels of the points that SAM's prompt encoder takes, as in segment_anything's ONNX export."""

NOT_A_POINT = -1  # ends a prompt that has no box
BACKGROUND_POINT = 0
FOREGROUND_POINT = 1
BOX_CORNERS = BOX_CORNER_1, BOX_CORNER_2 = 2, 3  # top left, bottom right
# Not in SAM: pads the prompts of a batch to one length. No attention sees such a token.
ABSENT = -2
