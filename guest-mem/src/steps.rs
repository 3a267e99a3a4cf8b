//! Steps of what is to cost few. Tests count them, since time tells little where others work as well.

#[cfg(test)]
thread_local! {
    static STEPS: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// Counts one.
#[inline]
pub(crate) fn step() {
    #[cfg(test)]
    STEPS.set(STEPS.get() + 1);
}

/// How many something takes.
#[cfg(test)]
pub(crate) fn steps<R>(action: impl FnOnce() -> R) -> (R, u64) {
    let before = STEPS.get();
    let done = action();
    (done, STEPS.get() - before)
}
