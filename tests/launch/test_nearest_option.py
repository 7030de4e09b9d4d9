from launch.command_line import nearest


def test_the_nearest_options():
    names = ["method", "method.loss", "method.lr", "teacher.steps", "method.steps", "trainer.devices"]
    assert nearest("method.lss", names) == ["method.loss"]
    assert nearest("steps", names) == ["method.steps", "teacher.steps"]
    assert nearest("mehtod.steps", names) == ["method.steps", "teacher.steps"]
    assert nearest("nothing", names) == []
