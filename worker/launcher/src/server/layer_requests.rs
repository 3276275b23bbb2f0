//! Requests about layers, and what comes of them.

use super::*;

impl Server {
    pub(super) fn unpack_layer(
        &mut self,
        asker: Asker,
        layer: UnpackLayer,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Option<Reply>, Refusal> {
        if let Some(record) = self.layers.verified(&layer.diff_id) {
            return Ok(Some(Reply::Layer(record.clone())));
        }
        if self.layers.contains(&layer.diff_id) {
            return self.layers.verify(layer.diff_id, Some(asker)).map(|()| None);
        }
        let blob = descriptors
            .into_iter()
            .next()
            .ok_or_else(|| invalid("no blob came with the request"))?;
        let blob = File::from(blob);
        let facts = blob
            .metadata()
            .map_err(|_| invalid("the blob cannot be examined"))?;
        if !facts.is_file() || facts.len() != layer.size {
            return Err(invalid("the blob is not a file of the size named"));
        }
        self.layers
            .unpack(layer.diff_id, layer.compression, blob.into(), asker)
            .map(|()| None)
    }

    pub(super) fn remove_layer(&mut self, asker: Asker, diff_id: DiffId) -> Result<Option<Reply>, Refusal> {
        let used = self
            .tasks
            .values()
            .any(|task| task.record.layers.contains(&diff_id))
            || self
                .waiting
                .iter()
                .any(|start| start.spec.layers.contains(&diff_id));
        if used {
            return Err(Refusal::new(RefusalCode::Busy, "a task uses this layer"));
        }
        if !self.layers.contains(&diff_id) {
            return Ok(Some(Reply::Done));
        }
        self.layers.remove(diff_id, asker).map(|()| None)
    }

    pub(super) fn layer_finished(&mut self, finished: Finished) {
        if let Err(refusal) = &finished.result {
            tracing::warn!(layer = %finished.diff_id, reason = %refusal, "work on a layer failed");
            // Starts that wait for it wait in vain.
            let (lost, kept) = std::mem::take(&mut self.waiting)
                .into_iter()
                .partition(|start| start.spec.layers.contains(&finished.diff_id));
            self.waiting = kept;
            let lost: Vec<WaitingStart> = lost;
            if finished.job == Job::Verify {
                lost.iter()
                    .for_each(|start| self.answer(start.asker, Err(refusal.clone()), Vec::new()));
            } else {
                self.waiting.extend(lost);
            }
        }
        for asker in finished.askers {
            let reply = match &finished.result {
                Ok(Some(record)) => Ok(Reply::Layer(record.clone())),
                Ok(None) => Ok(Reply::Done),
                Err(refusal) => Err(refusal.clone()),
            };
            self.answer(asker, reply, Vec::new());
        }
    }
}
