"""metrics.csv across crashes and resumes."""

from dataclasses import replace

from halfbyte.trainer.training.metrics import MetricsWriter, StepMetrics, read_metrics


def row(step, loss=1 / 3):
    return StepMetrics(step, loss, 1e-4, 0.1, 12.5, 0.0)


def test_rows_are_read_back_bitwise_identical(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write(row(1))
    writer.write(row(2, 0.1 + 0.2))
    writer.close()
    assert read_metrics(tmp_path / "metrics.csv") == [row(1), row(2, 0.1 + 0.2)]


def test_a_resumed_run_drops_the_rows_it_will_write_again(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    for step in range(1, 6):
        writer.write(row(step))
    writer.close()
    resumed = MetricsWriter(tmp_path, 3)
    resumed.write(row(4, 9.0))
    resumed.close()
    assert [(r.step, r.loss) for r in read_metrics(tmp_path / "metrics.csv")][2:] == [(3, 1 / 3), (4, 9.0)]


def test_the_file_of_an_older_version_is_continued(tmp_path, caplog):
    """It has no column skipped_steps."""
    names = "step,loss,lr,grad_norm,samples_per_second,memory_gib,validation_loss"
    path = tmp_path / "metrics.csv"
    path.write_text(f"{names}\r\n1,{1 / 3},0.0001,0.1,12.5,0.0,\r\n2,{1 / 3},0.0001,0.1,12.5,0.0,\r\n")
    resumed = MetricsWriter(tmp_path, 2)
    resumed.write(replace(row(3), skipped_steps=2))
    resumed.close()
    assert read_metrics(path) == [row(1), row(2), replace(row(3), skipped_steps=2)]
    assert path.read_text().startswith(f"{names},skipped_steps")
    assert not list(tmp_path.glob("*.damaged-*"))
    assert not caplog.records


def test_a_row_cut_short_by_a_crash_is_skipped(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write(row(1))
    writer.close()
    path = tmp_path / "metrics.csv"
    path.write_text(path.read_text() + "2,0.5,0.0")
    assert read_metrics(path) == [row(1)]
