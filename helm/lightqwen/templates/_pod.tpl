{{/* The one pod template, for a Deployment and for every node of a LeaderWorkerSet. */}}

{{- define "lightqwen.podTemplate" -}}
{{- $source := .Values.model.source -}}
metadata:
  annotations:
    checksum/config: {{ include "lightqwen.serverToml" . | sha256sum }}
    {{- with .Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  labels:
    {{- include "lightqwen.selectorLabels" . | nindent 4 }}
    {{- if .Values.inferencePool.enabled }}
    llm-d.ai/engine-type: {{ .Values.inferencePool.engineType | quote }}
    {{- end }}
    {{- with merge dict .Values.podLabels .Values.commonLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "lightqwen.serviceAccountName" . | quote }}
  automountServiceAccountToken: false
  # A Service called lightqwen would set LIGHTQWEN_PORT=tcp://..., which the server would read as its option.
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ include "lightqwen.terminationGracePeriodSeconds" . }}
  {{- with .Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.priorityClassName }}
  priorityClassName: {{ . | quote }}
  {{- end }}
  {{- with .Values.runtimeClassName }}
  runtimeClassName: {{ . | quote }}
  {{- end }}
  {{- with .Values.schedulerName }}
  schedulerName: {{ . | quote }}
  {{- end }}
  {{- with .Values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- range . }}
    - {{- toYaml . | nindent 6 }}
      {{- if not (hasKey . "labelSelector") }}
      labelSelector:
        matchLabels:
          {{- include "lightqwen.servingLabels" $ | nindent 10 }}
      {{- end }}
    {{- end }}
  {{- end }}
  securityContext:
    {{- toYaml .Values.podSecurityContext | nindent 4 }}
  {{- if or .Values.extraInitContainers (eq $source "huggingFace") }}
  initContainers:
    {{- with .Values.extraInitContainers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- if eq $source "huggingFace" }}
    {{- include "lightqwen.fetchContainer" . | nindent 4 }}
    {{- end }}
  {{- end }}
  containers:
    - name: lightqwen
      image: {{ include "lightqwen.image" . | quote }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      command: [lightqwen, serve, --config, /etc/lightqwen/config/server.toml]
      env:
        {{- include "lightqwen.writableEnv" . | nindent 8 }}
        - {name: HF_HUB_OFFLINE, value: "1"}
        {{- with .Values.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
        - {name: grpc, containerPort: {{ .Values.ports.grpc }}}
        - {name: health, containerPort: {{ .Values.ports.health }}}
        - {name: metrics, containerPort: {{ .Values.ports.metrics }}}
      # The port is the plaintext one that answers from outside the event loop: a busy server is not a dead one.
      startupProbe:
        grpc: {port: {{ .Values.ports.health }}, service: startup}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: {{ divf (include "lightqwen.startupBudgetSeconds" . | int) 10 | ceil }}
      readinessProbe:
        grpc: {port: {{ .Values.ports.health }}, service: readiness}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 3
      livenessProbe:
        grpc: {port: {{ .Values.ports.health }}, service: liveness}
        periodSeconds: 10
        timeoutSeconds: 10
        failureThreshold: {{ divf .Values.probes.livenessBudgetSeconds 10 | ceil }}
      {{- if gt (int .Values.lifecycle.preStopSeconds) 0 }}
      lifecycle:
        preStop:
          sleep: {seconds: {{ .Values.lifecycle.preStopSeconds }}}
      {{- end }}
      resources:
        {{- include "lightqwen.resources" . | nindent 8 }}
      securityContext:
        {{- toYaml .Values.securityContext | nindent 8 }}
      # A crash leaves its last words in the pod's status.
      terminationMessagePolicy: FallbackToLogsOnError
      volumeMounts:
        {{- include "lightqwen.writableMounts" . | nindent 8 }}
        {{- if (default dict .Values.kernelCache).claimName }}
        - {name: kernels, mountPath: /cache/triton}
        {{- end }}
        - {name: shm, mountPath: /dev/shm}
        - {name: config, mountPath: /etc/lightqwen/config, readOnly: true}
        {{- if ne $source "demo" }}
        - {name: models, mountPath: /models, readOnly: true}
        {{- end }}
        {{- if .Values.tls.enabled }}
        - {name: tls, mountPath: /etc/lightqwen/tls, readOnly: true}
        {{- if .Values.tls.clientCaSecretName }}
        - {name: client-ca, mountPath: /etc/lightqwen/client-ca, readOnly: true}
        {{- end }}
        {{- end }}
        {{- if .Values.auth.tokensSecretName }}
        - {name: tokens, mountPath: /etc/lightqwen/tokens, readOnly: true}
        {{- end }}
        {{- if .Values.auth.adminTokensSecretName }}
        - {name: admin-tokens, mountPath: /etc/lightqwen/admin-tokens, readOnly: true}
        {{- end }}
        {{- with .Values.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: {{ default (printf "%dGi" (mul 2 (include "lightqwen.ranksPerPod" . | int))) .Values.sharedMemory | quote }}
    - name: cache
      emptyDir: {sizeLimit: {{ .Values.cacheSizeLimit | quote }}}
    {{- with (default dict .Values.kernelCache).claimName }}
    - name: kernels
      persistentVolumeClaim: {claimName: {{ . | quote }}}
    {{- end }}
    - name: tmp
      emptyDir: {sizeLimit: {{ .Values.tmpSizeLimit | quote }}}
    - name: config
      configMap: {name: {{ include "lightqwen.fullname" . | quote }}}
    {{- if ne $source "demo" }}
    - name: models
      {{- include "lightqwen.modelVolume" . | nindent 6 }}
    {{- end }}
    {{- if and (eq $source "huggingFace") .Values.model.huggingFace.tokenSecret.name }}
    # Mounted by the init container alone: the server has no use for it.
    - name: hub-token
      secret: {secretName: {{ .Values.model.huggingFace.tokenSecret.name | quote }}, defaultMode: 0440}
    {{- end }}
    {{- if .Values.tls.enabled }}
    - name: tls
      secret: {secretName: {{ .Values.tls.secretName | quote }}, defaultMode: 0440}
    {{- if .Values.tls.clientCaSecretName }}
    - name: client-ca
      secret: {secretName: {{ .Values.tls.clientCaSecretName | quote }}, defaultMode: 0440}
    {{- end }}
    {{- end }}
    {{- if .Values.auth.tokensSecretName }}
    - name: tokens
      secret: {secretName: {{ .Values.auth.tokensSecretName | quote }}, defaultMode: 0440}
    {{- end }}
    {{- if .Values.auth.adminTokensSecretName }}
    - name: admin-tokens
      secret: {secretName: {{ .Values.auth.adminTokensSecretName | quote }}, defaultMode: 0440}
    {{- end }}
    {{- with .Values.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}

{{/* The root is read-only: whatever writes is told to write into a volume. */}}
{{- define "lightqwen.writableEnv" -}}
- {name: HOME, value: /tmp}
- {name: TMPDIR, value: /tmp}
- {name: XDG_CACHE_HOME, value: /cache}
- {name: HF_HOME, value: /cache/huggingface}
- {name: TRITON_CACHE_DIR, value: /cache/triton}
- {name: TORCHINDUCTOR_CACHE_DIR, value: /cache/inductor}
- {name: CUDA_CACHE_PATH, value: /cache/cuda}
{{- end -}}

{{- define "lightqwen.writableMounts" -}}
- {name: cache, mountPath: /cache}
- {name: tmp, mountPath: /tmp}
{{- end -}}

{{/* GPUs as limits only would do, but then a quota on requests would not see them. */}}
{{- define "lightqwen.resources" -}}
{{- $resources := deepCopy .Values.resources -}}
{{- if eq .Values.engine.device "cuda" -}}
{{- $gpus := include "lightqwen.ranksPerPod" . | int -}}
{{- range $kind := list "requests" "limits" -}}
{{- $_ := set $resources $kind (merge (dict $.Values.gpu.resourceName $gpus) (default dict (get $resources $kind))) -}}
{{- end -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{- define "lightqwen.modelVolume" -}}
{{- $model := .Values.model -}}
{{- if eq $model.source "hostPath" -}}
hostPath: {path: {{ $model.hostPath.path | quote }}, type: Directory}
{{- else if eq $model.source "oci" -}}
image: {reference: {{ $model.oci.reference | quote }}, pullPolicy: {{ $model.oci.pullPolicy }}}
{{- else if eq $model.source "pvc" -}}
persistentVolumeClaim: {claimName: {{ include "lightqwen.modelClaimName" . | quote }}, readOnly: true}
{{- else if include "lightqwen.modelClaimName" . -}}
persistentVolumeClaim: {claimName: {{ include "lightqwen.modelClaimName" . | quote }}}
{{- else -}}
emptyDir: {}
{{- end -}}
{{- end -}}

{{/* Fetches one commit. Ends at once when all of it is there, goes on where an earlier try stopped, and locks files
against other pods on the same volume. The server then has no network to the hub and needs none. */}}
{{- define "lightqwen.fetchContainer" -}}
{{- $hub := .Values.model.huggingFace -}}
- name: fetch-model
  image: {{ include "lightqwen.image" . | quote }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  command:
    - hf
    - download
    - {{ $hub.repository | quote }}
    - --revision
    - {{ $hub.revision | quote }}
    - --local-dir
    - {{ include "lightqwen.modelFolder" . | quote }}
    {{- range list "*.json" "*.safetensors" "*.jinja" "merges.txt" "vocab.txt" }}
    - --include
    - {{ . | quote }}
    {{- end }}
  env:
    {{- include "lightqwen.writableEnv" . | nindent 4 }}
    - {name: HF_HUB_DISABLE_TELEMETRY, value: "1"}
    {{- if $hub.tokenSecret.name }}
    - {name: HF_TOKEN_PATH, value: {{ printf "/etc/lightqwen/hub-token/%s" $hub.tokenSecret.key | quote }}}
    {{- end }}
    {{- with .Values.extraEnv }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  resources:
    requests: {cpu: "1", memory: 2Gi}
    limits: {memory: 8Gi}
  securityContext:
    {{- toYaml .Values.securityContext | nindent 4 }}
  terminationMessagePolicy: FallbackToLogsOnError
  volumeMounts:
    {{- include "lightqwen.writableMounts" . | nindent 4 }}
    - {name: models, mountPath: /models}
    {{- if $hub.tokenSecret.name }}
    - {name: hub-token, mountPath: /etc/lightqwen/hub-token, readOnly: true}
    {{- end }}
{{- end -}}
