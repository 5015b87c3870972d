//! Rendered pages shared by concurrent requests, so that unread responses hold few copies.

use std::sync::{Arc, Mutex, Weak};

use axum::body::Bytes;
use tokio::sync::Semaphore;

use crate::account::lock;
use crate::clock::{self, Moment};

/// Versions of one page that responses may hold at once. Beyond that, a request gets the newest version.
const ALIVE: usize = 4;

/// One page.
#[derive(Debug, Default)]
pub(super) struct CachedPage(Mutex<PageVersions>);

#[derive(Debug, Default)]
struct PageVersions {
    /// From the oldest to the newest: when rendering began, and the text while a response holds it.
    alive: Vec<(Moment, Weak<PageBody>)>,
    /// Requests that wait for a text.
    waiting: usize,
    /// The newest, kept for those that wait.
    newest: Option<Arc<PageBody>>,
}

#[derive(Debug)]
struct PageBody(Vec<u8>);

/// A text as the body of an answer.
struct SharedBody(Arc<PageBody>);

impl AsRef<[u8]> for SharedBody {
    fn as_ref(&self) -> &[u8] {
        &self.0.0
    }
}

/// Counts a request as waiting as long as it lives.
struct WaitingRequest<'p>(&'p CachedPage);

impl<'p> WaitingRequest<'p> {
    fn new(page: &'p CachedPage) -> Self {
        lock(&page.0).waiting += 1;
        Self(page)
    }
}

impl Drop for WaitingRequest<'_> {
    fn drop(&mut self) {
        let mut texts = lock(&self.0.0);
        texts.waiting -= 1;
        if texts.waiting == 0 {
            texts.newest = None;
        }
    }
}

impl PageVersions {
    /// A text that was begun after this moment; or, where there are too many, the newest.
    fn find(&mut self, asked: Moment) -> Option<Arc<PageBody>> {
        self.alive.retain(|(_, text)| text.strong_count() > 0);
        let (began, text) = self.alive.last()?;
        let is_fit = *began >= asked || self.alive.len() >= ALIVE;
        is_fit.then(|| text.upgrade()).flatten()
    }

    fn keep(&mut self, began: Moment, text: &Arc<PageBody>) {
        self.alive.push((began, Arc::downgrade(text)));
        self.newest = Some(Arc::clone(text));
    }
}

impl CachedPage {
    /// The page as it is now. It is made on a thread of its own, so that health checks, probes and the drain do not wait for
    /// it, one at a time: with 100,000 tenants it takes a second. `None` where that failed.
    pub(super) async fn text<E: Send + 'static>(
        &self,
        turn: &Arc<Semaphore>,
        render: impl FnOnce() -> Result<Vec<u8>, E> + Send + 'static,
    ) -> Option<Result<Bytes, E>> {
        let asked = clock::now();
        let _waiting = WaitingRequest::new(self);
        let turn = Arc::clone(turn).acquire_owned().await.ok()?;
        let found = lock(&self.0).find(asked);
        if let Some(text) = found {
            return Some(Ok(Bytes::from_owner(SharedBody(text))));
        }
        let began = clock::now();
        let made = tokio::task::spawn_blocking(move || (render(), turn));
        let made = made.await.inspect_err(|error| tracing::error!(%error, "cannot render the page"));
        // The turn is held until the text is stored, so that waiting requests find it.
        let (made, _turn) = made.ok()?;
        Some(made.map(|text| {
            let text = Arc::new(PageBody(text));
            lock(&self.0).keep(began, &text);
            Bytes::from_owner(SharedBody(text))
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::atomic::{AtomicU8, Ordering};

    use super::*;

    struct Maker {
        page: CachedPage,
        turn: Arc<Semaphore>,
        made: Arc<AtomicU8>,
    }

    impl Maker {
        fn new() -> Self {
            Self { page: CachedPage::default(), turn: Arc::new(Semaphore::new(1)), made: Arc::default() }
        }

        /// The page: how many were made before it.
        async fn ask(&self) -> Bytes {
            let made = Arc::clone(&self.made);
            let render = move || Ok::<_, Infallible>(vec![made.fetch_add(1, Ordering::SeqCst)]);
            self.page.text(&self.turn, render).await.unwrap().unwrap()
        }
    }

    #[tokio::test]
    async fn requests_that_wait_together_share_one_text() {
        let maker = Maker::new();
        let held = Arc::clone(&maker.turn).acquire_owned().await.unwrap();
        let release = async { drop(held) };
        let (one, two, three, ()) = tokio::join!(maker.ask(), maker.ask(), maker.ask(), release);
        assert_eq!([&one[..], &two, &three], [[0]; 3]);
        assert_eq!(one.as_ptr(), three.as_ptr());
        assert_eq!(maker.ask().await[..], [1], "one that asks later gets a newer text");
        assert!(lock(&maker.page.0).newest.is_none(), "a text that no answer holds is freed");
    }

    #[tokio::test]
    async fn unread_answers_hold_a_bounded_number_of_texts() {
        let maker = Maker::new();
        let mut unread = Vec::new();
        for _ in 0..32 {
            unread.push(maker.ask().await);
        }
        assert_eq!(usize::from(maker.made.load(Ordering::SeqCst)), ALIVE);
        assert_eq!(unread[31][..], [3]);
        // Once the oldest is read, there is room for a new one.
        unread.remove(0);
        assert_eq!(maker.ask().await[..], [4]);
    }
}
