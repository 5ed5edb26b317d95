import numpy as np

from imaging import visualize


def test_panel_tints_only_masked_pixels():
    image = np.full((4, 6, 3), 100, np.uint8)
    truth, prediction = np.zeros((4, 6), bool), np.zeros((4, 6), bool)
    truth[1, 2] = prediction[3, 5] = True
    picture = visualize.panel(image, truth, prediction)
    assert picture.shape == (4, 18, 3)
    changed = (picture != 100).any(axis=2)
    assert np.argwhere(changed).tolist() == [[1, 6 + 2], [3, 12 + 5]]
    assert (image == 100).all()


def test_prompts_are_drawn_where_they_are():
    image = np.zeros((50, 60, 3), np.uint8)
    points = np.array([[40, 10], [0, 0], [0, 0]], np.float32)
    drawn = visualize.draw_points(image, points, np.array([1, -1, -2]))
    rows, columns = np.nonzero(drawn.any(axis=2))
    assert (rows.mean(), columns.mean()) == (10, 40)
    corners = np.array([[5, 10], [50, 40]], np.float32)
    boxed = visualize.draw_points(image, corners, np.array([2, 3])).any(axis=2)
    assert boxed[10, 20] and boxed[25, 50] and not boxed[25, 20]


def test_sheet_stacks_pictures_of_any_size():
    assert visualize.sheet([np.zeros((10, 20, 3), np.uint8), np.zeros((30, 10, 3), np.uint8)], 100).shape == (
        350,
        100,
        3,
    )
