{{/* Refusals: what a schema cannot see. Included once, by the ConfigMap; every problem is told, not only the first. */}}

{{- define "lightqwen.check" -}}
{{- $problems := concat
  (include "lightqwen.modelProblems" . | fromJsonArray)
  (include "lightqwen.engineProblems" . | fromJsonArray)
  (include "lightqwen.scalingProblems" . | fromJsonArray)
  (include "lightqwen.accessProblems" . | fromJsonArray)
  (include "lightqwen.watchingProblems" . | fromJsonArray)
  (include "lightqwen.environmentProblems" . | fromJsonArray) -}}
{{- if $problems -}}
{{- fail (printf "\n\nlightqwen cannot be installed with these values:\n  - %s\n" (join "\n  - " $problems)) -}}
{{- end -}}
{{- end -}}

{{- define "lightqwen.modelProblems" -}}
{{- $problems := list -}}
{{- $model := .Values.model -}}
{{- $hub := $model.huggingFace -}}
{{- if not $model.source -}}
{{- $problems = append $problems "model.source is missing: choose pvc, hostPath, huggingFace, oci, or demo for the checkpoint in the image" -}}
{{- end -}}
{{- if and (eq $model.source "pvc") (not $model.pvc.claimName) -}}
{{- $problems = append $problems "model.source is pvc: model.pvc.claimName is missing" -}}
{{- end -}}
{{- if and (eq $model.source "hostPath") (not $model.hostPath.path) -}}
{{- $problems = append $problems "model.source is hostPath: model.hostPath.path is missing" -}}
{{- end -}}
{{- if and (eq $model.source "oci") (not $model.oci.reference) -}}
{{- $problems = append $problems "model.source is oci: model.oci.reference is missing" -}}
{{- end -}}
{{- if and (eq $model.source "oci") (semverCompare "<1.31.0-0" .Capabilities.KubeVersion.Version) -}}
{{- $problems = append $problems (printf "model.source is oci: Kubernetes %s has no volumes from images; 1.31 has them behind the feature gate ImageVolume, 1.35 by default" .Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- if and (has $model.source (list "pvc" "hostPath" "oci")) (not $model.path) (not $model.name) -}}
{{- $problems = append $problems "model.name is missing: without model.path there is no folder to name the model after" -}}
{{- end -}}
{{- if eq $model.source "huggingFace" -}}
{{- if not $hub.repository -}}
{{- $problems = append $problems "model.source is huggingFace: model.huggingFace.repository is missing" -}}
{{- end -}}
{{- if not $hub.revision -}}
{{- $problems = append $problems "model.source is huggingFace: model.huggingFace.revision is missing; pin a commit, so that every pod serves the same weights" -}}
{{- end -}}
{{- if $model.path -}}
{{- $problems = append $problems "model.path belongs to pvc, hostPath and oci; model.source is huggingFace" -}}
{{- end -}}
{{- if and $hub.storage.claimName $hub.storage.size -}}
{{- $problems = append $problems "model.huggingFace.storage: claimName (an existing claim) and size (a new one) exclude each other" -}}
{{- end -}}
{{- if and $hub.storage.size (include "lightqwen.manyPods" .) (not (has "ReadWriteMany" $hub.storage.accessModes)) -}}
{{- $problems = append $problems "model.huggingFace.storage.accessModes must have ReadWriteMany: more than one pod shares the claim" -}}
{{- end -}}
{{- end -}}
{{- toJson $problems -}}
{{- end -}}

{{- define "lightqwen.engineProblems" -}}
{{- $problems := list -}}
{{- $ranks := int .Values.engine.tensorParallelSize -}}
{{- $nodes := int .Values.engine.nodes -}}
{{- if ne (mod $ranks $nodes) 0 -}}
{{- $problems = append $problems (printf "engine.tensorParallelSize (%d) does not divide by engine.nodes (%d): every node takes as many GPUs" $ranks $nodes) -}}
{{- end -}}
{{- range $kind, $entries := .Values.resources -}}
{{- if hasKey (default dict $entries) $.Values.gpu.resourceName -}}
{{- $problems = append $problems (printf "resources.%s has %s: the chart computes it from engine.tensorParallelSize" $kind $.Values.gpu.resourceName) -}}
{{- end -}}
{{- end -}}
{{- $reserved := list "config" "revision" "served_model_name" "nodes" "node_rank" "leader_address" "leader_port" "join_timeout_s" "tls_cert" "tls_key" "tls_client_ca" "auth_tokens_file" "admin_tokens_file" -}}
{{- $reserved = concat $reserved (keys (include "lightqwen.decided" . | fromYaml)) -}}
{{- range $key, $_ := .Values.config -}}
{{- if has $key $reserved -}}
{{- $problems = append $problems (printf "config.%s is the chart's to decide: it follows from other values" $key) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.leaderWorkerSet.exclusiveTopologyKey (eq $nodes 1) -}}
{{- $problems = append $problems "leaderWorkerSet.exclusiveTopologyKey is set, and engine.nodes is 1: there is no group to keep together" -}}
{{- end -}}
{{- toJson $problems -}}
{{- end -}}

{{- define "lightqwen.scalingProblems" -}}
{{- $problems := list -}}
{{- $scaling := .Values.autoscaling -}}
{{- if and $scaling.keda.enabled $scaling.hpa.enabled -}}
{{- $problems = append $problems "autoscaling.keda and autoscaling.hpa are both enabled: two scalers would fight over the replicas" -}}
{{- end -}}
{{- if and (include "lightqwen.autoscaled" .) (not (kindIs "invalid" .Values.replicaCount)) -}}
{{- $problems = append $problems "replicaCount is set and a scaler is enabled: every upgrade would undo the scaler's work; use autoscaling.minReplicas" -}}
{{- end -}}
{{- if gt (int $scaling.minReplicas) (int $scaling.maxReplicas) -}}
{{- $problems = append $problems (printf "autoscaling.minReplicas (%d) is more than autoscaling.maxReplicas (%d)" (int $scaling.minReplicas) (int $scaling.maxReplicas)) -}}
{{- end -}}
{{- if and $scaling.keda.enabled (not $scaling.keda.serverAddress) -}}
{{- $problems = append $problems "autoscaling.keda.serverAddress is missing: KEDA asks that Prometheus" -}}
{{- end -}}
{{- if and (include "lightqwen.autoscaled" .) (not (include "lightqwen.scraped" .)) -}}
{{- $problems = append $problems "a scaler is enabled, and neither podMonitor nor serviceMonitor: it would have no metrics" -}}
{{- end -}}
{{- toJson $problems -}}
{{- end -}}

{{/* `auto` counts: whether the cluster knows the kind cannot be told while rendering without one. */}}
{{- define "lightqwen.scraped" -}}
{{ if or .Values.serviceMonitor.enabled .Values.podMonitor.enabled }}true{{ end }}
{{- end -}}

{{- define "lightqwen.accessProblems" -}}
{{- $problems := list -}}
{{- if and .Values.tls.enabled (not .Values.tls.secretName) -}}
{{- $problems = append $problems "tls.enabled: tls.secretName is missing" -}}
{{- end -}}
{{- if and .Values.tls.clientCaSecretName (not .Values.tls.enabled) -}}
{{- $problems = append $problems "tls.clientCaSecretName is set and tls.enabled is not: no client would be asked for a certificate" -}}
{{- end -}}
{{- if and .Values.auth.adminTokensSecretName (not .Values.auth.tokensSecretName) -}}
{{- $problems = append $problems "auth.adminTokensSecretName is set and auth.tokensSecretName is not: every other call would be open" -}}
{{- end -}}
{{- if and .Values.auth.tokensSecretName .Values.helmTest.enabled (not .Values.helmTest.tokenSecretName) -}}
{{- $problems = append $problems "helmTest.tokenSecretName is missing: callers need a token, `helm test` too (or set helmTest.enabled to false)" -}}
{{- end -}}
{{- if and .Values.helmTest.tokenSecretName (not .Values.auth.tokensSecretName) -}}
{{- $problems = append $problems "helmTest.tokenSecretName is set, and no caller needs a token" -}}
{{- end -}}
{{- if and .Values.tls.clientCaSecretName .Values.helmTest.enabled (not .Values.helmTest.clientCertSecretName) -}}
{{- $problems = append $problems "helmTest.clientCertSecretName is missing: callers need a certificate, `helm test` too (or set helmTest.enabled to false)" -}}
{{- end -}}
{{- if and .Values.grpcRoute.enabled (not .Values.grpcRoute.parentRefs) -}}
{{- $problems = append $problems "grpcRoute.enabled: grpcRoute.parentRefs is missing" -}}
{{- end -}}
{{- if and .Values.inferencePool.enabled (not .Values.inferencePool.endpointPicker.name) -}}
{{- $problems = append $problems "inferencePool.enabled: inferencePool.endpointPicker.name is missing" -}}
{{- end -}}
{{- if and .Values.inferencePool.enabled .Values.tls.enabled -}}
{{- $problems = append $problems "inferencePool and tls are both enabled: the pool speaks plaintext HTTP/2 (h2c) to pods" -}}
{{- end -}}
{{- $ports := list .Values.ports.grpc .Values.ports.health .Values.ports.metrics .Values.ports.leader -}}
{{- if ne (len (uniq $ports)) (len $ports) -}}
{{- $problems = append $problems "ports.grpc, ports.health, ports.metrics and ports.leader must differ" -}}
{{- end -}}
{{- toJson $problems -}}
{{- end -}}

{{- define "lightqwen.watchingProblems" -}}
{{- $problems := list -}}
{{- if and .Values.podMonitor.enabled (ne (toString .Values.podMonitor.enabled) "auto") .Values.serviceMonitor.enabled -}}
{{- $problems = append $problems "podMonitor and serviceMonitor are both enabled: every sample would be counted twice" -}}
{{- end -}}
{{- $alerts := list -}}
{{- range $path, $_ := .Files.Glob "rules/*.yaml" -}}
{{- range $group := ($.Files.Get $path | fromYaml).groups -}}
{{- range $rule := $group.rules -}}
{{- $alerts = concat $alerts (compact (list $rule.alert)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range .Values.prometheusRule.disabledAlerts -}}
{{- if not (has . $alerts) -}}
{{- $problems = append $problems (printf "prometheusRule.disabledAlerts has %s, which is no alert: there are %s" . (join ", " $alerts)) -}}
{{- end -}}
{{- end -}}
{{- toJson $problems -}}
{{- end -}}

{{- define "lightqwen.environmentProblems" -}}
{{- $problems := list -}}
{{- range .Values.extraEnv -}}
{{- if and (hasPrefix "LIGHTQWEN_" .name) (ne .name "LIGHTQWEN_WITHOUT") -}}
{{- $problems = append $problems (printf "extraEnv has %s: options of the server belong to config" .name) -}}
{{- end -}}
{{- if and (hasKey . "value") (regexMatch "(^|_)(TOKEN|PASSWORD|SECRET|API_?KEY)$" .name) -}}
{{- $problems = append $problems (printf "extraEnv has %s as a plain value: use valueFrom.secretKeyRef" .name) -}}
{{- end -}}
{{- end -}}
{{- toJson $problems -}}
{{- end -}}
